"""The engine in a thread of its own, the only one that uses it.

The event loop sends it function calls through a queue; tokens come back by `call_soon_threadsafe`.
"""

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from functools import partial
from itertools import islice

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from minorca.generate.engine import Engine
from minorca.generate.request import Request, Token
from minorca.serve.choice import Choice
from minorca.serve.errors import APIError

SECONDS_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class _CachedPromptTokens(Collector):
    """A counter that the engine keeps."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self) -> Iterator[CounterMetricFamily]:
        yield CounterMetricFamily(
            "minorca_cached_prompt_tokens",
            "Prompt tokens read of the cache instead of computed; of a prompt with several choices, those of each",
            value=self.engine.reused_tokens,
        )


class Metrics:
    """Prometheus metrics."""

    def __init__(self, engine: Engine):
        registry = CollectorRegistry()
        running = Gauge("minorca_running", "Running requests", registry=registry)
        running.set_function(lambda: engine.running)
        waiting = Gauge("minorca_waiting", "Requests waiting for a slot", registry=registry)
        waiting.set_function(lambda: engine.waiting)
        slots = Gauge("minorca_slots", "The maximum number of running requests", registry=registry)
        slots.set(engine.slots)
        self.registry = registry
        self.finished = Counter(
            "minorca_finished",
            "Admitted requests that ended, by finish reason; cancelled: the client left; refused: invalid prompt",
            ["reason"],
            registry=registry,
        )
        self.refused = Counter("minorca_refused", "HTTP errors, by status", ["status"], registry=registry)
        self.connections_refused = Counter(
            "minorca_connections_refused",
            "Connections closed at once, because few descriptors were left",
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "minorca_prompt_tokens", "Prompt tokens; a prompt with several choices counts once", registry=registry
        )
        registry.register(_CachedPromptTokens(engine))
        self.new_tokens = Counter(
            "minorca_new_tokens", "Generated tokens, including those after a stop string", registry=registry
        )
        self.first_token = Histogram(
            "minorca_first_token_seconds",
            "From the arrival of an HTTP request to its first token",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self.duration = Histogram(
            "minorca_duration_seconds",
            "From the arrival of an HTTP request to the end of its response",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )


class EngineThread(threading.Thread):
    """Opens the engine and runs it. All methods but `run` are for the event loop's thread, in which it must be created.

    No other thread should compute with torch: OpenMP gives each one that does threads of its own, and where these are
    more than the cores, all of them sleep after every operation. Decoding then takes up to twice as long.

    Args:
        open_engine: called in this thread.
        max_waiting: the number of HTTP requests that may wait for a slot.
    """

    engine: Engine
    metrics: Metrics
    max_requests: int

    def __init__(self, open_engine: Callable[[], Engine], max_waiting: int):
        super().__init__(name="engine", daemon=True)
        # What was admitted and has not ended: HTTP requests, and their requests to the engine.
        self.admitted: set[Completion] = set()
        self.completions: dict[Request, Completion] = {}
        # The exception that ended the engine. `on_failure` is called then.
        self.failure: Exception | None = None
        self.on_failure: Callable[[], None] | None = None
        self._open_engine = open_engine
        self._max_waiting = max_waiting
        self._opened: Future[Engine] = Future()
        self._loop = asyncio.get_running_loop()
        # Functions to call between two steps; None ends the thread.
        self._calls: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()

    async def open(self) -> None:
        """Starts the thread; returns when the engine is open, or raises what opening it raises."""
        self.start()
        self.engine = await asyncio.wrap_future(self._opened)
        self.metrics = Metrics(self.engine)
        self.max_requests = self.engine.slots + self._max_waiting

    def run(self) -> None:
        # A signal that ends the event loop does not cancel it any more.
        self._opened.set_running_or_notify_cancel()
        try:
            engine = self._open_engine()
        except BaseException as error:
            self._opened.set_exception(error)
            return
        self._opened.set_result(engine)
        try:
            while True:
                while not (engine.busy and self._calls.empty()):
                    function = self._calls.get()
                    if function is None:
                        return
                    function()
                tokens = engine.step()
                if tokens:
                    self._loop.call_soon_threadsafe(self._deliver, tokens)
        except Exception as error:
            self._loop.call_soon_threadsafe(self._fail, error)

    def call(self, function: Callable[..., object], *arguments) -> None:
        """Calls a function in the engine's thread, between two steps."""
        self._calls.put(partial(function, *arguments))

    def stop(self) -> None:
        """Ends the thread after the current step."""
        self._calls.put(None)
        self.join()

    def _deliver(self, tokens: list[Token]) -> None:
        self.metrics.new_tokens.inc(sum(token.id >= 0 for token in tokens))
        for token in tokens:
            completion = self.completions.get(token.request)
            if completion:
                completion.received.put_nowait(token)

    def _fail(self, error: Exception) -> None:
        self.failure = error
        for completion in self.admitted:
            completion.received.put_nowait(None)
        if self.on_failure:
            self.on_failure()


class Completion:
    """The engine's work for one HTTP request: its choices, each of which is a request to the engine.

    As many of them as the engine has slots are submitted at a time, so that others come in between. As a context
    manager it admits the HTTP request, or raises APIError if there are too many; on exit it cancels the choices that
    have not ended."""

    def __init__(self, thread: EngineThread, choices: dict[Request, Choice]):
        self.thread = thread
        self.choices = choices
        self.prompt_tokens = 0
        # Tokens from the engine; None: it has failed.
        self.received: asyncio.Queue[Token | None] = asyncio.Queue()
        self._arrival = time.perf_counter()
        self._submitted = False
        # The choices that wait for others of this request to end, and the number of those that have not ended.
        self._waiting = iter(choices)
        self._left = len(choices)

    def __enter__(self) -> "Completion":
        if self.thread.failure:
            raise APIError(503, "the engine has failed; the server is shutting down")
        if len(self.thread.admitted) >= self.thread.max_requests:
            raise APIError(
                429,
                "too many requests are in progress; try again later",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )
        self.thread.admitted.add(self)
        return self

    def __exit__(self, *exception) -> None:
        self.thread.admitted.discard(self)
        for request in self.choices:
            if self.thread.completions.pop(request, None):
                self.thread.call(self.thread.engine.cancel, request)
        self.thread.metrics.finished.labels("cancelled" if self._submitted else "refused").inc(self._left)
        if self._submitted:
            self.thread.metrics.duration.observe(time.perf_counter() - self._arrival)

    def _submit_next(self) -> None:
        for request in islice(self._waiting, 1):
            self.thread.completions[request] = self
            self.thread.call(self.thread.engine.add, request)

    def _end(self, request: Request, reason: str) -> None:
        del self.thread.completions[request]
        self._left -= 1
        self.thread.metrics.finished.labels(reason).inc()
        # A stop string, of which the engine does not know, leaves it running.
        self.thread.call(self.thread.engine.cancel, request)
        self._submit_next()

    async def generate(self) -> AsyncIterator[tuple[Choice, str]]:
        """Submits the requests; yields choices with their new text until all choices are finished.

        Raises:
            APIError: the engine has failed.
        """
        self._submitted = True
        self.thread.metrics.prompt_tokens.inc(self.prompt_tokens)
        for _ in range(self.thread.engine.slots):
            self._submit_next()
        is_first = True
        while self._left:
            token = await self.received.get()
            if token is None:
                raise APIError(500, "the engine has failed; the server is shutting down")
            if is_first:
                self.thread.metrics.first_token.observe(time.perf_counter() - self._arrival)
                is_first = False
            choice = self.choices[token.request]
            # Ended by a stop string, which the engine does not know of.
            if choice.finish_reason:
                continue
            text = choice.push(token)
            if choice.finish_reason:
                self._end(token.request, choice.finish_reason)
            yield choice, text
            # However many tokens have arrived, other tasks run, and a client that left is noticed.
            await asyncio.sleep(0)

    @property
    def usage(self) -> dict[str, int]:
        """OpenAI's counts of tokens."""
        new = sum(choice.tokens for choice in self.choices.values())
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": new, "total_tokens": self.prompt_tokens + new}
