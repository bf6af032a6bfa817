"""A scheduler for generation with continuous batching (Yu et al. 2022, Orca).

The batch has a fixed number of slots. A request takes a free slot, reads of the cache what it holds of its prompt, and
computes the rest in chunks; then every step adds one token to each running sequence. A slot is free again when its
sequence ends. A step computes chunks of several prompts in one forward of at most a fixed number of tokens (Sarathi,
Agrawal et al. 2023, arXiv:2308.16369), so that the running answers wait for one such forward at most, and a step of
decoding always computes all slots.

Bits: on the CPU, where `slots` is 1 or a multiple of 4, those of an answer depend on its request, on `slots` and on the
set of adapters alone; not on what else is computed, nor on how its prompt was divided into chunks or what of it was
cached. An exception are tokens of its prompt that this engine has generated: their keys and values are those that
decoding computed. With other numbers of slots torch's fp32 products depend on the slot. On a GPU the bits also depend
on what is computed in the same forward of a prompt.

On CUDA the sampled ids are copied to the host while the next step is already running.

Axes in names: N slots, T tokens, H hidden, V vocabulary; M prompts that end with this step.
"""

import signal
import sys
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from minorca.generate.decode_step import DecodeStep
from minorca.generate.kv_cache import KVCache, affordable_pages
from minorca.generate.on_device import copy_to, row_multiple
from minorca.generate.prompts import choose_chunks, key_cost
from minorca.generate.request import Request, Sequence, Token, check_request, default_max_length
from minorca.generate.results import PendingTokens
from minorca.generate.sampling import Sampler
from minorca.model.build import (
    fast_dtype,
    install_adapters,
    load_adapters,
    load_model,
    prepack,
    remove_adapter,
)
from minorca.model.lora import NO_ADAPTER, AdapterChoice, LoRA
from minorca.model.network import Mistral
from minorca.progress import progress_bar
from minorca.signals import signals_noted
from minorca_kernels import FrozenWeight, is_sharded

# Prompt tokens that are computed between two decoding steps, by type of device: a GPU's products need more rows, until
# their time is that of arithmetic and not of reading the weights.
CHUNK = {"cuda": 2048, "cpu": 256}
# And while no answer is running that would have to wait. On a CPU a small model takes a tenth less time for as many
# tokens in chunks of 512; with longer ones nothing is gained, and the next request waits for them.
IDLE_CHUNK = {"cuda": 2048, "cpu": 512}


class Engine:
    """Generates for up to `slots` requests at once. Not thread-safe.

    Args:
        model: on its device, in its dtype.
        slots: the number of sequences that are generated at once.
        max_length: the maximum number of tokens of a prompt and its continuation; by default the model's positions.
        adapters: what `load_adapters` returned for this model; None: requests cannot name an adapter.
        chunk: the number of prompt tokens that are computed at once, where they see few others; by default 2048 on
            CUDA, on the CPU 512, and 256 beside running answers.

    Raises:
        UserError: the key/value cache does not fit in memory.
    """

    def __init__(
        self,
        model: Mistral,
        slots: int = 8,
        max_length: int | None = None,
        adapters: AdapterChoice | None = None,
        chunk: int | None = None,
    ):
        weight = model.embedding.weight
        self.model = model
        self.slots = slots
        self.device = weight.device
        self.chunk = chunk or CHUNK[self.device.type]
        self._idle_chunk = chunk or IDLE_CHUNK[self.device.type]
        self.vocab_size = model.arch.vocab_size
        self.max_length = max_length or default_max_length(model.arch)
        self._key_cost = key_cost(model.arch, self.device.type)
        pages = affordable_pages(model, slots, self.max_length, self._idle_chunk)
        self.cache = KVCache(model.arch, slots, self.max_length, model.dtype, self.device, self._idle_chunk, pages)
        self._adapters = adapters or AdapterChoice([], self.device)
        self._sampler = Sampler(slots, self.vocab_size, self.device)
        self._decode_step = DecodeStep(model, self.cache, self._sampler, self._adapters)
        # Each slot's adapter, as `AdapterChoice.index` numbers them.
        self._adapter_N = torch.zeros(slots, dtype=torch.int64, device=self.device)

        self._waiting: deque[Request] = deque()
        self._running: dict[Request, Sequence] = {}
        # In their order of arrival.
        self._prefilling: list[Sequence] = []
        self._pending: deque[PendingTokens] = deque()
        self._free_slots = list(range(slots))

    # ----------------------------------------------------------------------------------------------- requests

    @property
    def adapters(self) -> list[str]:
        """The names that `Request.adapter` may have."""
        return [name for name in self._adapters.names if name not in self._adapters.removed]

    def add_adapter(self, name: str, loras: dict[int, LoRA]) -> None:
        """Adds an adapter that `read_adapter` has read for the model, between two steps.

        Args:
            name: what requests call it. It tells caches of different adapters apart, also of those that were removed.

        Raises:
            ValueError: the engine has an adapter of that name, or had one.
            torch.OutOfMemoryError: the engine is as it was.
        """
        install_adapters(self.model, self._adapters, {name: loras})
        self._decode_step.reset_graphs()

    def remove_adapter(self, name: str) -> None:
        """Removes an adapter between two steps, and frees its memory.

        Raises:
            ValueError: a request uses it.
        """
        if any(request.adapter == name for request in (*self._running, *self._waiting)):
            raise ValueError(f"a request uses the adapter {name}")
        remove_adapter(self.model, self._adapters, name)
        self.cache.tree.forget(name)
        self._decode_step.reset_graphs()

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def reused_tokens(self) -> int:
        """The tokens of all prompts so far that were read of the cache instead of computed."""
        return self.cache.reused_tokens

    @property
    def busy(self) -> bool:
        return bool(self._running or self._waiting)

    def check(self, request: Request) -> None:
        """Raises UserError for every invalid field of a request."""
        check_request(request, self.vocab_size, self.max_length, self.adapters)

    def add(self, request: Request) -> None:
        """Queues a request. Raises UserError as `check` does."""
        self.check(request)
        self._waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Removes a request, waiting or running; `step` returns no more tokens of it. Does nothing if it has ended."""
        if request in self._running:
            self._release(self._running[request])
        elif request in self._waiting:
            self._waiting.remove(request)

    def stream(self, request: Request) -> Generator[Token, None, None]:
        """The tokens of a single request, as they are generated; closing the iterator cancels it.

        SIGINT and SIGTERM are deferred to the end of a step, so that all layers of the cache hold the same tokens.

        Raises:
            UserError: as `check` does.
        """
        self.add(request)
        bar = progress_bar("reading the prompt", len(request.prompt), "tokens")
        try:
            while self.busy:
                with signals_noted() as noted:
                    tokens = self.step()
                for signum in noted[:1]:
                    signal.raise_signal(signum)
                for sequence in self._prefilling:
                    bar.update(int(self.cache.lengths[sequence.slot]) - bar.n)
                if tokens:
                    # before the caller prints them
                    bar.close()
                yield from tokens
        finally:
            bar.close()
            with signals_noted():
                self.cancel(request)

    # --------------------------------------------------------------------------------------------------- steps

    def step(self) -> list[Token]:
        """Computes up to one chunk of the prompts, then adds a token to every running sequence.

        Returns:
            The tokens that have reached the host. On CUDA the newest ones follow with the next call.
        """
        # FSDP reads the versions of tensors, which inference mode does not count
        with torch.no_grad() if is_sharded(self.model.embedding.weight) else torch.inference_mode():
            return self._step()

    def _step(self) -> list[Token]:
        self._admit()
        self._prefill()
        # What a constrained sequence may go on with depends on its last id.
        constrained = any(sequence.constraint for sequence in self._running.values())
        tokens = self._collect() if constrained else []
        if any(self.cache.active):
            self._decode()
        # The model's own forward, outside of the engine, is the base model's.
        self._adapters.in_use = False
        in_flight = 1 if self.device.type == "cuda" and any(self.cache.active) else 0
        return tokens + self._collect(in_flight)

    def _admit(self) -> None:
        """Gives free slots to waiting requests, in their order of arrival, while the cache has room for them."""
        while self._waiting and self._free_slots:
            request = self._waiting[0]
            length = len(request.prompt) + request.max_new_tokens
            if not self.cache.fits(length):
                break
            sequence = Sequence(request, self._free_slots[0], *self._to_device(request))
            # one that generates nothing has nothing to constrain
            if request.grammar and request.max_new_tokens:
                sequence.constraint = request.grammar.start()
            self.cache.open(sequence.slot, request.adapter, length)
            self._waiting.popleft()
            self._free_slots.pop(0)
            self._running[request] = sequence
            self._prefilling.append(sequence)
            self._adapter_N[sequence.slot : sequence.slot + 1] = sequence.adapter_1

    def _to_device(self, request: Request) -> tuple[Tensor, Tensor, Tensor]:
        """Copies what the device has to know of a request, at once."""
        sampling = request.sampling.words(request.sample)
        packed = copy_to(self.device, torch.tensor([self._adapters.index(request.adapter), *sampling, *request.prompt]))
        after = 1 + len(sampling)
        return packed[:1], packed[1:after], packed[after:]

    @contextmanager
    def _all_or_none(self, sequences: list[Sequence]) -> Iterator[None]:
        """Drops these sequences if an error comes before all layers hold their new tokens."""
        try:
            yield
        except BaseException:
            for sequence in sequences:
                self._release(sequence, is_whole=False)
            raise

    def _prefill(self) -> None:
        """Computes chunks of prompts in one forward; after its last one, samples a prompt's first token."""
        budget, cost = (self.chunk, self._key_cost) if any(self.cache.active) else (self._idle_chunk, 0)
        chunks = choose_chunks(self._prefilling, self.cache, budget, cost)
        if not chunks:
            return
        tokens = sum(length for _, length in chunks)
        fill = -tokens % row_multiple(self.device)
        ids, adapters, last, ending = [], [], [], []
        for sequence, length in chunks:
            start = self.cache.lengths[sequence.slot]
            ids.append(sequence.prompt_T[start : start + length])
            adapters.append(sequence.adapter_1.expand(length))
            if start + length == len(sequence.request.prompt):
                ending.append(sequence)
                last.append(sum(map(len, ids)) - 1)
        ids.append(ids[0].new_zeros(fill))
        adapters.append(torch.full_like(ids[-1], NO_ADAPTER))
        self._adapters.choose(torch.cat(adapters), any(sequence.request.adapter is not None for sequence, _ in chunks))
        last_M = copy_to(self.device, torch.tensor(last + last[:1] * (-len(last) % row_multiple(self.device))))
        with self._all_or_none([sequence for sequence, _ in chunks]):
            attend = self.cache.prefill([(sequence.slot, length) for sequence, length in chunks], tokens + fill)
            logits_MV = self.model(torch.cat(ids), attend=attend, head=partial(self._prompt_head, chunks, last_M))
        for sequence, _ in chunks:
            self.cache.record(sequence.slot, sequence.request.prompt, sequence in ending)
        for row, sequence in enumerate(ending):
            with self._all_or_none([sequence]):
                self._start_decoding(sequence, logits_MV[row : row + 1])

    @staticmethod
    def _prompt_head(
        chunks: list[tuple[Sequence, int]], last_M: Tensor, hidden_TH: Tensor, head: FrozenWeight
    ) -> Tensor | None:
        """The logits after the rows that end prompts [M, V]; scores the prompts that ask for it."""
        parts = hidden_TH.split([*(length for _, length in chunks), len(hidden_TH) - sum(n for _, n in chunks)])
        for (sequence, _), part_TH in zip(chunks, parts):
            if sequence.prompt_scores:
                sequence.prompt_scores.score(part_TH, head)
        return head.linear(hidden_TH.index_select(0, last_M)) if len(last_M) else None

    def _start_decoding(self, sequence: Sequence, logits_1V: Tensor) -> None:
        """Samples the first token of a prompt that is computed, and activates its slot."""
        request, slot = sequence.request, sequence.slot
        self._prefilling.remove(sequence)
        if sequence.constraint:
            self._sampler.masks.set(slot, sequence.constraint)
        own = slice(slot, slot + 1)
        settings = request.sampling, sequence.words_5, sequence.prompt_T, request.stop_ids, request.min_new_tokens
        self._sampler.set(slot, *settings)
        self.cache.set_active(slot, True)
        ids_1 = self._sampler(logits_1V, self.cache.lengths_N[own], own, self._sampler.ops(own))
        self._decode_step.tokens_N[own] = ids_1
        self._pending.append(PendingTokens([(0, sequence)], ids_1, logits_1V))
        self._count_scheduled(sequence)

    def _decode(self) -> None:
        decoding = [sequence for sequence in self._running.values() if self.cache.active[sequence.slot]]
        with self._all_or_none(decoding):
            self.cache.advance()
            self._adapters.choose(self._adapter_N, any(request.adapter is not None for request in self._running))
            self._sampler.masks.update()
            logits_NV = self._decode_step.run()
        rows = [(sequence.slot, sequence) for sequence in decoding]
        self._pending.append(PendingTokens(rows, self._decode_step.tokens_N, logits_NV))
        for sequence in decoding:
            self._count_scheduled(sequence)

    def _count_scheduled(self, sequence: Sequence) -> None:
        sequence.scheduled += 1
        if sequence.scheduled >= sequence.request.max_new_tokens:
            self.cache.set_active(sequence.slot, False)

    # ------------------------------------------------------------------------------------------------- results

    def _collect(self, in_flight: int = 0) -> list[Token]:
        """The tokens of all steps but the last `in_flight`; sequences that have ended release their slots."""
        tokens: list[Token] = []
        while len(self._pending) > in_flight:
            for sequence, token in self._pending.popleft().wait():
                request = sequence.request
                # Cancelled, or ended by a stop id, while this token was being computed.
                if self._running.get(request) is not sequence:
                    continue
                finish_reason = sequence.append(token.id)
                tokens.append(replace(token, finish_reason=finish_reason))
                if finish_reason:
                    self._release(sequence)
        return tokens

    def _release(self, sequence: Sequence, is_whole: bool = True) -> None:
        """Frees a sequence's slot; what it has computed is kept for others if it `is_whole`."""
        request, slot = sequence.request, sequence.slot
        del self._running[request]
        if sequence in self._prefilling:
            self._prefilling.remove(sequence)
        self._sampler.clear(slot)
        self.cache.close(slot, request.prompt + sequence.ids if is_whole else None)
        self._free_slots.append(slot)


def open_engine(
    path: str | Path,
    adapters: Mapping[str, str | Path],
    slots: int,
    max_length: int | None = None,
    alone: bool = False,
    quantize: str | None = None,
    double_quant: bool = True,
) -> Engine:
    """Loads a model in its fastest form on this machine, and reports on standard error how fast the weights were read.

    The engine takes over the model, whose weights are prepacked: it can be used for generation only.

    Args:
        path: the model's directory.
        adapters: PEFT adapters' directories by the names that requests use.
        slots, max_length: as `Engine` takes them.
        alone: every request uses the adapter, if there is one, which may then change the embedding and head.
        quantize, double_quant: as `load_model` takes them.

    Raises:
        UserError: a file is missing or invalid, or the key/value cache does not fit in memory.
    """
    started = time.perf_counter()
    adapter = next(iter(adapters.values()), None) if alone else None
    model = load_model(path, fast_dtype(), None, adapter, quantize, double_quant, vocabulary_only=True)
    seconds = time.perf_counter() - started
    gigabytes = sum(parameter.nbytes for parameter in model.parameters()) / 1e9
    adapter_choice = load_adapters(model, dict(adapters), alone)
    engine = Engine(model, slots, max_length, adapter_choice)
    # After the engine has checked the memory beside the model's parameters, which this replaces.
    prepack(model, slots)
    speed = f"{gigabytes:.2f} GB in {seconds:.2f} s, {gigabytes / seconds:.1f} GB/s"
    print(f"{path}: {speed}", file=sys.stderr, flush=True)
    return engine
