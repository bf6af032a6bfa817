"""The engine in a thread of its own, in which alone it is touched, and what the event loop knows of it.

Calls go there by a queue, tokens come back by `call_soon_threadsafe`.
"""

import asyncio
import queue
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from minorca.generate.engine import Engine, Request, Token
from minorca.serve.protocol import Choice, Refused


class Metrics:
    """What Prometheus reads."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        gauges = {
            "running": "Requests in a slot",
            "waiting": "Requests that wait for a slot",
            "slots": "Rows of a batch",
        }
        for name, text in gauges.items():
            self._make(Gauge, name, text).set_function(partial(getattr, engine, name))
        ended = "Requests that had a seat; cancelled: the client left; refused: a prompt was wrong"
        self.finished = self._make(Counter, "finished", ended, labelnames=["reason"])
        self.refused = self._make(Counter, "refused", "Answers that were errors, by HTTP status", labelnames=["status"])
        self.prompt_tokens = self._make(Counter, "prompt_tokens", "Tokens of prompts, each once for all its answers")
        self.new_tokens = self._make(Counter, "new_tokens", "Tokens generated, also those behind a stop string")
        buckets = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
        self.first_token = self._make(
            Histogram, "first_token_seconds", "From a call's arrival to its first token", buckets=buckets
        )
        self.duration = self._make(
            Histogram, "duration_seconds", "From a call's arrival to the end of its answer", buckets=buckets
        )

    def _make(self, kind: type, name: str, text: str, **options):
        return kind(f"minorca_{name}", text, registry=self.registry, **options)


class EngineThread(threading.Thread):
    """Runs the engine. All but `run` is the event loop's to call."""

    def __init__(self, engine: Engine, queued: int):
        super().__init__(name="engine", daemon=True)
        self.engine, self.seats, self.metrics = engine, engine.slots + queued, Metrics(engine)
        self.answers: dict[Request, Answer] = {}  # of every request that has a seat
        self.failure: Exception | None = None
        self.when_failed: Callable[[], None] = lambda: None
        self._loop, self._calls = asyncio.get_running_loop(), queue.SimpleQueue()

    def run(self):
        try:
            while True:
                while not (self.engine.busy and self._calls.empty()):
                    self._calls.get()()
                if tokens := self.engine.step():
                    self._loop.call_soon_threadsafe(self._deliver, tokens)
        except Exception as error:
            self._loop.call_soon_threadsafe(self._fail, error)

    def call(self, function: Callable, *arguments) -> None:
        """Has a function called between two steps."""
        self._calls.put(partial(function, *arguments))

    def stop(self) -> None:
        self.call(sys.exit)  # in a thread it ends no more than that
        self.join()

    def _deliver(self, tokens: list[Token]) -> None:
        self.metrics.new_tokens.inc(len(tokens))
        for token in tokens:
            if answer := self.answers.get(token.request):
                answer.arrived.put_nowait(token)

    def _fail(self, error: Exception) -> None:
        self.failure = error
        for answer in set(self.answers.values()):
            answer.arrived.put_nowait(None)
        self.when_failed()


class Answer:
    """What one call gets: choices, each a request to the engine. They have their seats, or are refused together, within `with`."""

    def __init__(self, thread: EngineThread, choices: dict[Request, Choice]):
        self.thread, self.choices, self.started = thread, choices, time.perf_counter()
        self.sent, self.prompt_tokens = False, 0
        self.arrived: asyncio.Queue[Token | None] = asyncio.Queue()  # None: no more will come, the engine has failed

    def __enter__(self) -> "Answer":
        if self.thread.failure:
            raise Refused(503, "the engine has failed and the server is ending")
        if len(self.thread.answers) + len(self.choices) > self.thread.seats:
            raise Refused(
                429, "all places are taken; try again later", code="rate_limit_exceeded", headers={"Retry-After": "1"}
            )
        self.thread.answers |= dict.fromkeys(self.choices, self)
        return self

    def __exit__(self, *exception) -> None:
        for request in self.choices:
            self._leave(request, "cancelled" if self.sent else "refused")
        if self.sent:
            self.thread.metrics.duration.observe(time.perf_counter() - self.started)

    def _leave(self, request: Request, reason: str) -> None:
        if self.thread.answers.pop(request, None):
            self.thread.metrics.finished.labels(reason).inc()
            self.thread.call(self.thread.engine.cancel, request)  # which is nothing to one that is done

    async def grow(self) -> AsyncIterator[tuple[Choice, str]]:
        """Sends the requests off; gives choices and their new text until all are complete. Raises Refused: the engine fails."""
        self.sent = True
        self.thread.metrics.prompt_tokens.inc(self.prompt_tokens)
        for request in self.choices:
            self.thread.call(self.thread.engine.add, request)
        while any(request in self.thread.answers for request in self.choices):
            if (token := await self.arrived.get()) is None:
                raise Refused(500, "the engine failed; the server is ending")
            if not any(choice.tokens for choice in self.choices.values()):
                self.thread.metrics.first_token.observe(time.perf_counter() - self.started)
            choice = self.choices[token.request]
            if choice.finish_reason:  # a stop string has ended it before the engine knew
                continue
            text = choice.push(token)
            if choice.finish_reason:
                self._leave(token.request, choice.finish_reason)
            yield choice, text
            await asyncio.sleep(
                0
            )  # others have their turn, and a client that left is noticed, however many tokens are here

    @property
    def usage(self) -> dict[str, int]:
        new = sum(choice.tokens for choice in self.choices.values())
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": new, "total_tokens": self.prompt_tokens + new}
