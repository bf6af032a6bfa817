"""Requests in, tokens out: prompts are read in chunks, answers grow together, one token a step, and each leaves when it is done.

Continuous batching (Yu et al. 2022, Orca): a row of the batch that is free takes the next request at the next step. A prompt is
read on its own in chunks of one size, and a step always has as many rows as there are, so what an answer is computed from, to
the bit, depends on nothing but its request, the number of rows and the chunk.

On CUDA a step, sampling included, is one captured graph, and its ids are read while the next one runs.
"""

import os
import signal
import sys
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minorca.errors import UserError, raise_problems
from minorca.generate.kv_cache import KVCache
from minorca.generate.prepack import prepack
from minorca.generate.row_adapters import load_adapters
from minorca.generate.sampling import Sampler, Sampling
from minorca.model.architecture import Architecture
from minorca.model.build import fast_dtype, load_model
from minorca.model.network import Mistral
from minorca.signals import signals_noted

CHUNK = 512  # tokens of a prompt that are read at once, between two steps of the others


@dataclass(eq=False)
class Request:
    """One answer to be generated."""

    prompt: list[int]
    max_new_tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: Collection[int] = ()
    adapter: str | None = None
    logprobs: int | None = (
        None  # k: the log probability of each id and the k likeliest at its place, before any sampling
    )
    sample: int = 0  # which of several answers to one prompt; added one after another they share its reading


@dataclass(frozen=True)
class Token:
    """The next id of an answer; the last one, a stop id or the most asked for, has the reason."""

    request: Request
    id: int
    logprob: float | None
    top: list[tuple[int, float]] | None
    finish_reason: str | None  # None, "stop" or "length"


@dataclass
class _Answer:
    row: int
    launched: int = 0  # tokens under way or done
    ids: list[int] = field(default_factory=list)


@dataclass
class _Result:
    """Of one launch: where in its tensors which request's token is."""

    places: list[tuple[int, Request, _Answer]]
    ids: Tensor
    chosen: Tensor | None
    top: tuple[Tensor, Tensor] | None
    done: torch.cuda.Event | None


def longest(arch: Architecture) -> int:
    """Tokens that a model was made for, where its files say."""
    return arch.max_positions or 32768


def check(request: Request, vocab_size: int, max_length: int, adapters: Collection[str]) -> None:
    """Raises UserError: why the request cannot be served, by its field."""
    raise_problems(_problems(request, vocab_size, max_length, adapters))


def _problems(request: Request, vocab_size: int, max_length: int, adapters: Collection[str]) -> Iterator[UserError]:
    prompt, new_tokens = len(request.prompt), request.max_new_tokens
    if not request.prompt:
        yield UserError("is empty; expected at least one token", field="prompt")
    if any(not 0 <= i < vocab_size for i in request.prompt):
        yield UserError(f"has ids outside the model's vocabulary of {vocab_size}", field="prompt")
    if new_tokens < 1:
        yield UserError(f"is {new_tokens}; expected at least 1", field="max_new_tokens")
    if prompt + new_tokens > max_length:
        yield UserError(
            f"{prompt} prompt tokens and {new_tokens} new ones are over the limit of {max_length}; shorten one of them"
        )
    if request.adapter not in (None, *adapters):
        yield UserError(f"is {request.adapter!r}; expected one of {list(adapters)}", field="adapter")
    if not 0 <= (request.logprobs or 0) <= vocab_size:
        yield UserError(f"is {request.logprobs}; expected 0 to {vocab_size}", field="logprobs")


class Engine:
    """A model, its key/value cache, and what is asked of them. Not thread-safe.

    Args:
        slots: rows of the batch: answers that grow together.
        max_length: tokens of a prompt and its answer, at most; by default the model's positions.
        adapters: PEFT directories by the name that requests choose them by.
        reuse: the row, of which there must be one, keeps what it read, and the next request goes on from the longest common
            beginning; its chunks then start elsewhere, so its bits depend on what came before.

    With adapters the model is the engine's: its projections are replaced by ones that choose among them. `prepack` comes after.

    Raises:
        UserError: an adapter's files are wrong, or the cache does not fit the memory.
    """

    def __init__(self, model: Mistral, slots: int = 8, max_length: int | None = None, adapters: dict[str, str | Path] | None = None,
                 reuse: bool = False, chunk: int = CHUNK):  # fmt: skip
        if reuse and slots > 1:
            raise ValueError("reuse is for one slot: other rows' steps write into a row that waits")
        weight, arch = model.embedding.weight, model.arch
        self.model, self.slots, self.reuse, self.chunk = model, slots, reuse, chunk
        self.device, self.vocab_size = weight.device, arch.vocab_size
        self.max_length = max_length or longest(arch)
        self.cache = KVCache(arch, slots, self.max_length, weight.dtype, self.device)
        self._check_memory(2 * arch.layers * arch.kv_heads * arch.head_dim * weight.element_size())
        self._adapters = load_adapters(model, adapters or {})
        self._sampler = Sampler(slots, arch.vocab_size, self.device)
        self._tokens_N, self._place_N = (torch.zeros(slots, dtype=torch.int64, device=self.device) for _ in range(2))
        self._waiting: deque[Request] = deque()
        self._answers: dict[Request, _Answer] = {}
        self._reading: deque[Request] = deque()
        self._free = list(range(slots))
        self._read: list[tuple[str | None, list[int]]] = [
            (None, [])
        ] * slots  # what each row's cache is of: adapter and ids
        self._logits_1V: dict[int, Tensor] = {}  # after the prompt of each row
        self._results: deque[_Result] = deque()
        self._whole = True  # no step was cut short by an error, which would leave layers that know less than others
        self._graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, Tensor] | None] = {}
        self._captured_slots = 0

    def _check_memory(self, token_bytes: int) -> None:
        """Buffers grow when they are needed, but must be able to: an answer under way has nowhere to go."""
        needed = self.slots * self.cache.limit * token_bytes
        if self.device.type == "cuda":
            there = torch.cuda.mem_get_info(self.device)[0]
        else:
            there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") - sum(
                p.nbytes for p in self.model.parameters()
            )
        if needed > 0.9 * there:  # the rest is for what a step computes
            raise UserError(
                f"{self.slots} slots of {self.cache.limit} tokens take {needed / 1e9:.1f} GB of keys and values, and {there / 1e9:.1f} GB "
                "are there beside the weights; give fewer slots or a smaller maximal length"
            )

    # ----------------------------------------------------------------------------------------------- requests

    @property
    def adapters(self) -> list[str]:
        return self._adapters.names

    @property
    def running(self) -> int:
        return len(self._answers)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        return bool(self._answers or self._waiting)

    def check(self, request: Request) -> None:
        """Raises UserError: why the request cannot be served, by its field."""
        check(request, self.vocab_size, self.max_length, self.adapters)

    def add(self, request: Request) -> None:
        """Queues a request; errors as `check`."""
        self.check(request)
        self._waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Ends a request wherever it is; no token of it comes any more."""
        if request in self._answers:
            self._release(request)
        elif request in self._waiting:
            self._waiting.remove(request)

    def answer(self, request: Request) -> Iterator[Token]:
        """The tokens of a request that is alone; it ends when the iterator is closed. Errors as `check`.

        A signal waits for the step's end: one cut short would leave a cache of which some layers know a token more than others.
        """
        self.add(request)
        try:
            while self.busy:
                with signals_noted() as noted:
                    tokens = self.step()
                for signum in noted[:1]:
                    signal.raise_signal(signum)
                yield from tokens
        finally:
            with signals_noted():
                self.cancel(request)

    def _release(self, request: Request) -> None:
        answer = self._answers.pop(request)
        if request in self._reading:
            self._reading.remove(request)
        row = answer.row
        self.cache.activate(row, False)
        self._sampler.clear(row)
        self._logits_1V.pop(row, None)
        if self.reuse and self._whole:
            self._read[row] = (request.adapter, (request.prompt + answer.ids)[: self.cache.lengths[row]])
        else:
            self._read[row] = (None, [])
            self.cache.truncate(row, 0)
        self._free.append(row)

    # --------------------------------------------------------------------------------------------------- steps

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Reads prompts, in order, until they come to a chunk's length; then adds a token to every answer. Returns the tokens that are
        known by now."""
        self._whole = False
        while self._waiting and self._free:
            self._admit(self._waiting.popleft(), self._free.pop(0))
        budget = self.chunk
        while self._reading and budget > 0:
            budget -= self._read_on(self._reading[0])
        if any(self.cache.active):
            self._decode()
        self._whole, self._adapters.in_use = True, False
        ahead = self.device.type == "cuda" and any(self.cache.active)  # the newest results are still being computed
        tokens: list[Token] = []
        while len(self._results) > ahead:
            tokens += self._tokens(self._results.popleft())
        return tokens

    def _admit(self, request: Request, row: int) -> None:
        self._answers[request] = _Answer(row)
        self._reading.append(request)
        self._place_N[row] = self._adapters.place(request.adapter)
        if self.reuse:
            adapter, ids = self._read[row]
            before = (
                request.prompt[:-1] if adapter == request.adapter else []
            )  # the last token is read again: for its logits
            same = next((i for i, (a, b) in enumerate(zip(ids, before)) if a != b), min(len(ids), len(before)))
            self.cache.truncate(row, same if self.cache.holds(row, same) else 0)

    def _read_on(self, request: Request) -> int:
        """Reads the next chunk of a prompt; with its end, the answer's first token is drawn. Returns how many tokens it read."""
        row, prompt = self._answers[request].row, request.prompt
        logits_1V, read = self._copied(request), 0
        if logits_1V is None:
            start = self.cache.lengths[row]
            ids = torch.tensor(prompt[start : start + self.chunk], device=self.device)
            read, last = len(ids), start + len(ids) == len(prompt)
            self._adapters.choose(self._place_N[row : row + 1], request.adapter is not None)
            head = (lambda hidden, weight: self._head(hidden[-1:], weight)) if last else (lambda hidden, weight: None)
            logits_1V = self.model(ids, attend=self.cache.chunk(row, read), head=head)
        if logits_1V is not None:
            self._reading.popleft()
            self._read[row], self._logits_1V[row] = (request.adapter, prompt), logits_1V
            self._begin(request, logits_1V)
        return read

    def _copied(self, request: Request) -> Tensor | None:
        """The logits after a prompt that another row has read, whose keys and values become this row's too."""
        row = self._answers[request].row
        for other, logits_1V in self._logits_1V.items():
            if self._read[other] == (request.adapter, request.prompt) and self.cache.holds(other, len(request.prompt)):
                self.cache.copy(other, row, len(request.prompt))
                return logits_1V
        return None

    def _begin(self, request: Request, logits_1V: Tensor) -> None:
        row = self._answers[request].row
        only = slice(row, row + 1)
        self._sampler.set(row, request.sampling, request.sample, request.prompt)
        ids = self._sampler(logits_1V, self.cache.lengths_N[only], only, self._sampler.kind(only))
        self._tokens_N[only] = ids
        self._results.append(self._result([(0, request, self._answers[request])], ids, logits_1V))
        self.cache.activate(row, True)
        self._launched([request])

    def _decode(self) -> None:
        places = [
            (answer.row, request, answer) for request, answer in self._answers.items() if self.cache.active[answer.row]
        ]
        self.cache.advance()
        self._adapters.choose(self._place_N, any(request.adapter is not None for request in self._answers))
        logits_NV = self._launch()
        self._results.append(self._result(places, self._tokens_N, logits_NV))
        self._launched([request for _, request, _ in places])

    def _launched(self, requests: list[Request]) -> None:
        for request in requests:
            answer = self._answers[request]
            answer.launched += 1
            if answer.launched == request.max_new_tokens:
                self.cache.activate(answer.row, False)

    def _head(self, hidden_TH: Tensor, weight_VH: Tensor) -> Tensor:
        return (
            self.model.prepacked_head(hidden_TH)
            if hasattr(self.model, "prepacked_head")
            else F.linear(hidden_TH, weight_VH)
        )

    def _compute(self, kind: tuple[bool, bool, bool]) -> Tensor:
        """One step of all rows, on the device alone: from each one's last token to its next. Returns the logits."""
        logits_NV = self.model(self._tokens_N, attend=self.cache.step(), head=self._head)
        self._tokens_N.copy_(self._sampler(logits_NV, self.cache.lengths_N, slice(None), kind))
        return logits_NV

    def _launch(self) -> Tensor:
        """`_compute`; on CUDA as it is the first time, for kernels are compiled and chosen then, and from then on as one graph."""
        kind = self._sampler.kind(slice(None))
        if self.device.type != "cuda":
            return self._compute(kind)
        if self._captured_slots != self.cache.slots:  # the buffers are others
            self._graphs.clear()
            self._captured_slots = self.cache.slots
        key = (kind, self._adapters.in_use)
        if key not in self._graphs:
            self._graphs[key] = None
            return self._compute(kind)
        if self._graphs[key] is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits_NV = self._compute(kind)
            self._graphs[key] = graph, logits_NV
        graph, logits_NV = self._graphs[key]
        graph.replay()
        return logits_NV

    # ------------------------------------------------------------------------------------------------- results

    def _result(self, places: list[tuple[int, Request, _Answer]], ids: Tensor, logits: Tensor) -> _Result:
        """Starts the way of a launch's results to the host."""
        chosen = top = done = None
        if wanted := [request.logprobs for _, request, _ in places if request.logprobs is not None]:
            logprobs = logits.float().log_softmax(-1)
            chosen = self._to_host(logprobs.gather(-1, ids[:, None])[:, 0])
            top = tuple(self._to_host(t) for t in logprobs.topk(max(wanted)))
        ids = self._to_host(ids)
        if self.device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
        return _Result(places, ids, chosen, top, done)

    def _to_host(self, t: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return t.clone()
        return torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)

    def _tokens(self, result: _Result) -> list[Token]:
        if result.done:
            result.done.synchronize()
        ids, tokens = result.ids.tolist(), []
        for place, request, answer in result.places:
            if self._answers.get(request) is not answer:  # it ended while this was computed
                continue
            answer.ids.append(token := ids[place])
            stopped, full = token in request.stop_ids, len(answer.ids) == request.max_new_tokens
            logprob = top = None
            if request.logprobs is not None:
                logprob = result.chosen[place].item()
                values, likeliest = (t[place, : request.logprobs].tolist() for t in result.top)
                top = list(zip(likeliest, values))
            tokens.append(Token(request, token, logprob, top, "stop" if stopped else "length" if full else None))
            if stopped or full:
                self._release(request)
        return tokens


def open_engine(path: str | Path, adapters: dict[str, str | Path], **options) -> Engine:
    """What the commands generate with: a model in its fastest form on this machine, which is for nothing else. Once all is well,
    tells on standard error how fast the weights came.

    Args:
        options: as `Engine` takes them.

    Raises:
        UserError: what is wrong with which file.
    """
    model = load_model(path, fast_dtype())
    engine = Engine(model, adapters=adapters, **options)
    prepack(model)
    print(f"{path}: {model.loaded}", file=sys.stderr, flush=True)
    return engine
