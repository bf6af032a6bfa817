"""A scheduler for generation with continuous batching (Yu et al. 2022, Orca).

The batch has a fixed number of slots. A request takes a free slot, its prompt is prefilled in chunks, and then every
step adds one token to each running sequence; a slot is free again when its sequence ends. Prompts are prefilled one by
one, in chunks of one size, and a step always computes all slots, so that the bits of an answer depend on its request,
the number of slots and the chunk size alone, not on the other requests.

On CUDA the sampled ids are copied to the host while the next step is already running.

Axes in names: N slots, T tokens, H hidden, V vocabulary; 1V is the one row of logits after a prompt.
"""

import signal
import sys
import time
from collections import deque
from collections.abc import Generator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from minorca.generate.decode_step import DecodeStep
from minorca.generate.kv_cache import KVCache, check_memory
from minorca.generate.request import Request, Sequence, Token, check_request, default_max_length
from minorca.generate.results import PendingTokens
from minorca.generate.sampling import Sampler
from minorca.model.build import fast_dtype, load_adapters, load_model, prepack
from minorca.model.lora import AdapterChoice
from minorca.model.network import Mistral
from minorca.signals import signals_noted
from minorca_kernels import FrozenWeight

# Prompt tokens that are prefilled between two decoding steps, by type of device: a GPU's products need more rows, until
# their time is that of arithmetic and not of reading the weights.
CHUNK = {"cuda": 2048, "cpu": 512}


class Engine:
    """Generates for up to `slots` requests at once. Not thread-safe.

    Args:
        model: on its device, in its dtype.
        slots: the number of sequences that are generated at once.
        max_length: the maximum number of tokens of a prompt and its continuation; by default the model's positions.
        adapters: what `load_adapters` returned for this model; None: requests cannot name an adapter.
        reuse: keep the cache of the last sequence, and prefill only what follows the longest common prefix with the
            next prompt. Needs `slots=1`. Chunks then start at other positions, so the last bits may depend on the
            history.
        chunk: the number of prompt tokens that are prefilled at once; by default 2048 on CUDA, 512 on the CPU.

    Raises:
        UserError: the key/value cache does not fit in memory.
    """

    def __init__(
        self,
        model: Mistral,
        slots: int = 8,
        max_length: int | None = None,
        adapters: AdapterChoice | None = None,
        reuse: bool = False,
        chunk: int | None = None,
    ):
        if reuse and slots > 1:
            raise ValueError("reuse needs slots=1: decoding writes into the buffers of inactive slots")
        weight = model.embedding.weight
        self.model = model
        self.slots = slots
        self.reuse = reuse
        self.device = weight.device
        self.chunk = chunk or CHUNK[self.device.type]
        self.vocab_size = model.arch.vocab_size
        self.max_length = max_length or default_max_length(model.arch)
        self.cache = KVCache(model.arch, slots, self.max_length, model.dtype, self.device)
        check_memory(self.cache, model)
        self._adapters = adapters or AdapterChoice([], self.device)
        self._sampler = Sampler(slots, self.vocab_size, self.device)
        self._decode_step = DecodeStep(model, self.cache, self._sampler, self._adapters)
        # Each slot's adapter, as `AdapterChoice.index` numbers them.
        self._adapter_N = torch.zeros(slots, dtype=torch.int64, device=self.device)

        self._waiting: deque[Request] = deque()
        self._running: dict[Request, Sequence] = {}
        self._prefilling: deque[Sequence] = deque()
        self._pending: deque[PendingTokens] = deque()
        self._free_slots = list(range(slots))
        # What each slot's cache was computed from: an adapter and token ids.
        self._cached: list[tuple[str | None, list[int]]] = [(None, [])] * slots
        # The logits after the prompt of each slot that decodes.
        self._prompt_logits: dict[int, Tensor] = {}
        # False during a step, and after one that an error interrupted: some layers may have cached more tokens than
        # others.
        self._consistent = True

    # ----------------------------------------------------------------------------------------------- requests

    @property
    def adapters(self) -> list[str]:
        """The names that `Request.adapter` may have."""
        return self._adapters.names

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

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

    # --------------------------------------------------------------------------------------------------- steps

    def step(self) -> list[Token]:
        """Prefills up to one chunk, then adds a token to every running sequence.

        Returns:
            The tokens that have reached the host. On CUDA the newest ones follow with the next call.
        """
        # FSDP reads the versions of tensors, which inference mode does not count
        is_sharded = isinstance(self.model.embedding.weight, DTensor)
        with torch.no_grad() if is_sharded else torch.inference_mode():
            return self._step()

    def _step(self) -> list[Token]:
        self._consistent = False
        self._admit()
        self._prefill()
        # What a constrained sequence may go on with depends on its last id.
        constrained = any(sequence.constraint for sequence in self._running.values())
        tokens = self._collect() if constrained else []
        if any(self.cache.active):
            self._decode()
        self._consistent = True
        # The model's own forward, outside of the engine, is the base model's.
        self._adapters.in_use = False
        in_flight = 1 if self.device.type == "cuda" and any(self.cache.active) else 0
        return tokens + self._collect(in_flight)

    def _admit(self) -> None:
        while self._waiting and self._free_slots:
            request = self._waiting.popleft()
            sequence = Sequence(request, self._free_slots.pop(0), *self._to_device(request))
            sequence.constraint = request.grammar and request.grammar.start()
            self._running[request] = sequence
            self._prefilling.append(sequence)
            self._adapter_N[sequence.slot : sequence.slot + 1] = sequence.adapter_1
            if self.reuse:
                self._keep_common_prefix(sequence)

    def _to_device(self, request: Request) -> tuple[Tensor, Tensor, Tensor]:
        """Copies what the device has to know of a request, at once; on CUDA the host does not wait for it."""
        sampling = request.sampling.words(request.sample)
        packed = torch.tensor([self._adapters.index(request.adapter), *sampling, *request.prompt])
        if self.device.type == "cuda":
            packed = packed.pin_memory()
        packed = packed.to(self.device, non_blocking=True)
        after = 1 + len(sampling)
        return packed[:1], packed[1:after], packed[after:]

    def _keep_common_prefix(self, sequence: Sequence) -> None:
        request, slot = sequence.request, sequence.slot
        adapter, cached = self._cached[slot]
        # Without the last token, which is computed again for its logits.
        prompt = request.prompt[:-1] if adapter == request.adapter else []
        shorter = min(len(cached), len(prompt))
        common = next((i for i in range(shorter) if cached[i] != prompt[i]), shorter)
        self.cache.set_length(slot, common if self.cache.holds(slot, common) else 0)

    def _prefill(self) -> None:
        """Prefills prompts in their order of arrival until a chunk's number of tokens is reached."""
        budget = self.chunk
        while self._prefilling and budget > 0:
            budget -= self._prefill_chunk(self._prefilling[0])

    def _prefill_chunk(self, sequence: Sequence) -> int:
        """Prefills a prompt's next chunk; after the last one, samples the first token. Returns the chunk's length."""
        request, slot = sequence.request, sequence.slot
        shared_1V = self._copy_prefilled(sequence)
        if shared_1V is not None:
            self._start_decoding(sequence, shared_1V)
            return 0
        start = self.cache.lengths[slot]
        ids_T = sequence.prompt_T[start : start + self.chunk]
        is_last = start + len(ids_T) == len(request.prompt)
        self._adapters.choose(sequence.adapter_1, request.adapter is not None)
        head = self._last_logits if is_last else self._no_logits
        logits_1V = self.model(ids_T, attend=self.cache.prefill(slot, len(ids_T)), head=head)
        if is_last:
            self._start_decoding(sequence, logits_1V)
        return len(ids_T)

    @staticmethod
    def _last_logits(hidden_TH: Tensor, head: FrozenWeight) -> Tensor:
        return head.linear(hidden_TH[-1:])

    @staticmethod
    def _no_logits(hidden_TH: Tensor, head: FrozenWeight) -> None:
        return None

    def _copy_prefilled(self, sequence: Sequence) -> Tensor | None:
        """Copies the cache of a slot that has the same prompt and adapter; returns the logits after the prompt."""
        request = sequence.request
        length = len(request.prompt)
        for other, logits_1V in self._prompt_logits.items():
            if self._cached[other] == (request.adapter, request.prompt) and self.cache.holds(other, length):
                self.cache.copy_prefix(other, sequence.slot, length)
                return logits_1V
        return None

    def _start_decoding(self, sequence: Sequence, logits_1V: Tensor) -> None:
        """Samples the first token of a prompt that is prefilled, and activates its slot."""
        request, slot = sequence.request, sequence.slot
        self._prefilling.popleft()
        self._cached[slot] = (request.adapter, request.prompt)
        self._prompt_logits[slot] = logits_1V
        if sequence.constraint:
            self._sampler.masks.set(slot, sequence.constraint)
        own = slice(slot, slot + 1)
        self._sampler.set(slot, request.sampling, sequence.words_4, sequence.prompt_T)
        ids_1 = self._sampler(logits_1V, self.cache.lengths_N[own], own, self._sampler.ops(own))
        self._decode_step.tokens_N[own] = ids_1
        self._pending.append(PendingTokens([(0, sequence)], ids_1, logits_1V))
        self.cache.set_active(slot, True)
        self._count_scheduled(sequence)

    def _decode(self) -> None:
        decoding = [sequence for sequence in self._running.values() if self.cache.active[sequence.slot]]
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
        if sequence.scheduled == sequence.request.max_new_tokens:
            self.cache.set_active(sequence.slot, False)

    # ------------------------------------------------------------------------------------------------- results

    def _collect(self, in_flight: int = 0) -> list[Token]:
        """The tokens of all steps but the last `in_flight`; sequences that have ended release their slots."""
        tokens: list[Token] = []
        while len(self._pending) > in_flight:
            for sequence, token, logprob, top in self._pending.popleft().wait():
                request = sequence.request
                # Cancelled, or ended by a stop id, while this token was being computed.
                if self._running.get(request) is not sequence:
                    continue
                finish_reason = sequence.append(token)
                tokens.append(Token(request, token, logprob, top, finish_reason))
                if finish_reason:
                    self._release(sequence)
        return tokens

    def _release(self, sequence: Sequence) -> None:
        request, slot = sequence.request, sequence.slot
        del self._running[request]
        if sequence in self._prefilling:
            self._prefilling.remove(sequence)
        self.cache.set_active(slot, False)
        self._sampler.clear(slot)
        self._prompt_logits.pop(slot, None)
        if self.reuse and self._consistent:
            self._cached[slot] = (request.adapter, (request.prompt + sequence.ids)[: self.cache.lengths[slot]])
        else:
            self._cached[slot] = (None, [])
            self.cache.set_length(slot, 0)
        self._free_slots.append(slot)


def open_engine(
    path: str | Path,
    adapters: Mapping[str, str | Path],
    slots: int,
    max_length: int | None = None,
    reuse: bool = False,
    alone: bool = False,
    quantize: str | None = None,
    double_quant: bool = True,
) -> Engine:
    """Loads a model in its fastest form on this machine, and reports on standard error how fast the weights were read.

    The engine takes over the model, whose weights are prepacked: it can be used for generation only.

    Args:
        path: the model's directory.
        adapters: PEFT adapters' directories by the names that requests use.
        slots, max_length, reuse: as `Engine` takes them.
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
    engine = Engine(model, slots, max_length, adapter_choice, reuse)
    # After the engine has checked the memory beside the model's parameters, which this replaces.
    prepack(model)
    speed = f"{gigabytes:.2f} GB in {seconds:.2f} s, {gigabytes / seconds:.1f} GB/s"
    print(f"{path}: {speed}", file=sys.stderr, flush=True)
    return engine
