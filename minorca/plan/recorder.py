"""Records what a program on fake tensors asks of its device: launches, waits of the host, copies, and memory.

A launch is an operation of aten on the device's tensors that is neither a view nor an allocation, or a Triton kernel;
none is run. Operators of ours run their implementations for the device, so their own launches and scratch memory are
seen. On the CPU, where attention reads a batch's positions, what follows from real tensors alone is computed.
"""

import contextlib
import functools
import re
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._op_schema import OpSchema
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from triton.runtime.jit import JITFunction

from minorca_kernels import local_tensor

aten = torch.ops.aten
KEYS = {
    "cuda": torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA),
    "cpu": torch._C.DispatchKeySet(torch._C.DispatchKey.CPU),
}
# of our operators, those in which logits exist
HEADS = {"linear_cross_entropy", "linear_cross_entropy_weight_gradient"}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# they read rows of their first argument, as many as they return
GATHERS = {"embedding", "gather", "index", "index_select"}
# they write into their first argument, and do not read it; these, as many rows as their last has
ROWS_WRITTEN = {"index_copy_", "index_put_"}
# a Triton kernel that writes as many rows of these arguments as another argument has
TRITON_ROWS_WRITTEN = {"_rope_into_cache_kernel": ({"k_ptr", "v_ptr"}, "index_ptr")}
OVERWRITES = {"copy_", "fill_", "zero_", "uniform_"}
# on the CPU they make a buffer like their first argument
BUFFERED = {"logsumexp"}
# they wait for the GPU
SYNCS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal"}
COLLECTIVES = {
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
}
# tensors, and chunks of 65,536 elements, that one launch takes of lists of this many tensors
LIST_LIMITS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
CHUNK, CHUNKS = 65536, 320


@dataclass(frozen=True)
class Launch:
    """One kernel.

    Attributes:
        name: the operation of aten, or the Triton kernel.
        owner: the operator of ours that launched it, or "".
        phase: of the program, as `Recorder.phase` named it.
        captured: in a CUDA graph.
        shapes: of its tensors.
        bytes: every element of its arguments and results read or written once.
        flops: of matrix products.
    """

    name: str
    owner: str
    phase: str
    captured: bool
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    flops: int


@dataclass(frozen=True)
class Wait:
    """A wait of the host for the GPU, or a copy between the two that blocks.

    Attributes:
        what: the operation.
    """

    what: str
    phase: str
    captured: bool


def touched_bytes(t: Tensor) -> int:
    """The bytes of a tensor's elements; one that is repeated by a stride of 0 counts once."""
    count = 1
    for size, stride in zip(t.shape, t.stride()):
        count *= size if stride else min(size, 1)
    return count * t.element_size()


def _place(t: Tensor) -> tuple:
    return id(t.untyped_storage()), t.storage_offset(), t.shape


class Recorder(TorchDispatchMode):
    """Records while it is entered.

    Attributes:
        phase: what the program is doing, for what is recorded from now on.
        part: of the network, in which it does that.
        captured: whether a CUDA graph is being captured.
        launches, waits: in order.
        collectives, collective_bytes: (a value of COLLECTIVES, phase) -> how many, and the bytes of whole tensors: what
            a gather returns, what a scatter is given.
        async_copies: phase -> how many copies between host and GPU did not block.
        crossed: phase -> bytes of all copies between host and GPU.
        memory: in order, (number of a storage on the device, its change in bytes, phase).
        parts: of the network, of each entry in `memory`.
        regathered: numbers of the storages that were resized: FSDP's whole parameters, which it frees and fills again.
    """

    def __init__(self, device_type: str = "cuda"):
        super().__init__()
        self.device_type = device_type
        self.phase = "build"
        self.part = ""
        self.captured = False
        self.launches: list[Launch] = []
        self.waits: list[Wait] = []
        self.collectives: Counter[tuple[str, str]] = Counter()
        self.collective_bytes: Counter[tuple[str, str]] = Counter()
        self.async_copies: Counter[str] = Counter()
        self.crossed: Counter[str] = Counter()
        self.memory: list[tuple[int, int, str]] = []
        self.parts: list[str] = []
        self.regathered: set[int] = set()
        self._paused = False
        self._owner = ""
        self._owners: list[str] = []
        self._numbers = WeakIdKeyDictionary()
        self._sizes: list[int] = []
        self._pinned = WeakIdKeyDictionary()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Within it, everything is recorded, Triton's launches and resized storages included."""
        resize = torch.UntypedStorage.resize_

        def record_resize(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            if storage in self._numbers:
                self.regathered.add(self._numbers[storage])
                self._set_size(self._numbers[storage], size)

        def record_triton(kernel: JITFunction, *arguments, grid, warmup, **constants) -> None:
            self._record_triton(kernel, arguments)

        def shapes_alone(propagator: ShardingPropagator, schema: OpSchema):
            self._paused = True
            try:
                return propagate(propagator, schema)
            finally:
                self._paused = False

        # DTensor computes the shapes of whole tensors on fake ones, which exist nowhere
        propagate = ShardingPropagator._propagate_tensor_meta_non_cached
        propagated = mock.patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", shapes_alone)
        resized = mock.patch.object(torch.UntypedStorage, "resize_", record_resize)
        with propagated, resized, mock.patch.object(JITFunction, "run", record_triton), self:
            yield

    def wait(self, what: str) -> None:
        self.waits.append(Wait(what, self.phase, self.captured))

    # -------------------------------------------------------------------------------------------------- operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self._paused:
            return func(*args, **(kwargs or {}))
        if any(issubclass(kind, DTensor) for kind in types):
            # it comes again as the operations on what this rank holds
            return NotImplemented
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(map(self._is_here, tensors))
        if func.namespace == "minorca" and on_device:
            owner, self._owner = self._owner, func.overloadpacket.__name__
            with self:
                out = func.redispatch(KEYS[self.device_type], *args, **kwargs)
            self._owner = owner
            return out
        if func.namespace in ("c10d", "_c10d_functional") and (kind := COLLECTIVES.get(func.overloadpacket.__name__)):
            size = max(t.nbytes for t in tensors)
            self.collectives[kind, self.phase] += 1
            self.collective_bytes[kind, self.phase] += size
        if _is_composed(func):
            with self:
                return func.decompose(*args, **kwargs)
        name = func.overloadpacket.__name__
        if self.device_type == "cpu" and _is_real(name, tensors):
            with _disable_current_modes():
                out = func(*args, **kwargs)
            for t in tree_leaves(out):
                self._track(t)
            return out
        if on_device and (name in SYNCS or (name == "index" and any(t.dtype == torch.bool for t in tensors[1:]))):
            self.wait(name)
        if name == "_local_scalar_dense":
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if name in BUFFERED:
            # freed at once
            self._track(torch.empty_like(args[0]))
        # fake tensors cannot be pinned
        out = aten.clone.default(args[0]) if name == "_pin_memory" else func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for t in results:
            self._track(t)
            if name == "_pin_memory" or kwargs.get("pin_memory"):
                self._pinned[t.untyped_storage()] = True
        self._record(func, args, kwargs, tensors, results)
        return out

    def _record(self, func, args, kwargs, tensors: list[Tensor], results: list[Tensor]) -> None:
        name = func.overloadpacket.__name__
        schema = func._schema
        if not any(map(self._is_here, (*tensors, *results))) or name in ALLOCATIONS:
            return
        storages = {id(t.untyped_storage()) for t in tensors}
        if not schema.is_mutable and all(id(t.untyped_storage()) in storages for t in results):
            return  # a view, or nothing
        if results and not any(t.numel() for t in results):
            return
        if name in ("copy_", "_to_copy") and self._crosses(tensors, results, kwargs, args):
            return
        inputs = {_place(t): touched_bytes(t) for t in tensors}
        outputs = {_place(t): touched_bytes(t) for t in results}
        size = sum(inputs.values()) + sum(outputs[place] for place in outputs.keys() - inputs.keys())
        moved = sum(outputs.values())
        if name in GATHERS:
            size += moved - touched_bytes(tensors[0])
        elif name in ROWS_WRITTEN:
            size += touched_bytes(tensors[-1]) - touched_bytes(tensors[0])
        elif schema.is_mutable and name not in OVERWRITES and schema.overload_name != "out" and kwargs.get("beta") != 0:
            written = [arg for arg, given in zip(schema.arguments, args) if arg.alias_info and arg.alias_info.is_write]
            size += sum(touched_bytes(t) for t in tree_leaves(args[: len(written)]) if isinstance(t, Tensor))
        elif kwargs.get("beta") == 0 and not schema.is_mutable:
            size -= touched_bytes(tensors[0])
        for _ in range(_list_launches(args)):
            self._add(name, [*tensors, *results], size // _list_launches(args), _matmul_flops(name, tensors))

    def _crosses(self, tensors: list[Tensor], results: list[Tensor], kwargs: dict, args: tuple) -> bool:
        """Whether a copy is between host and GPU; notes whether the host waits for it."""
        source, target = tensors[-1], results[0]
        if source.is_cuda == target.is_cuda:
            return False
        host = target if source.is_cuda else source
        self.crossed[self.phase] += source.nbytes
        non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
        if non_blocking and host.untyped_storage() in self._pinned:
            self.async_copies[self.phase] += 1
        else:
            self.wait(f"copy of {list(source.shape)} to {target.device.type}")
        return True

    def _record_triton(self, kernel: JITFunction, arguments: tuple) -> None:
        source = kernel.src
        sizes: dict[tuple, int] = {}
        tensors = []
        named = dict(zip(kernel.arg_names, arguments))
        some_rows, counted_by = TRITON_ROWS_WRITTEN.get(kernel.__name__, ((), ""))
        for name, argument in named.items():
            if isinstance(argument, Tensor):
                in_place = all(re.search(rf"tl\.{access}\(\s*{name}\b", source) for access in ("load", "store"))
                rows = argument[: len(named[counted_by])] if name in some_rows else argument
                sizes[_place(argument)] = touched_bytes(rows) * (1 + in_place)
                tensors.append(argument)
        self._add(kernel.__name__, tensors, sum(sizes.values()), 0)

    def _add(self, name: str, tensors: Iterable[Tensor], size: int, flops: int) -> None:
        shapes = tuple(tuple(t.shape) for t in tensors)
        self.launches.append(Launch(name, self._owner, self.phase, self.captured, shapes, size, flops))

    # ------------------------------------------------------------------------------------------------------ memory

    def number(self, t: Tensor) -> int | None:
        """The number of a tensor's storage in `memory`; None: it is not on the GPU, or was not made in the block."""
        t = local_tensor(t)
        return self._numbers.get(t.untyped_storage())

    def _is_here(self, t: Tensor) -> bool:
        return t.device.type == self.device_type

    def _track(self, t: object) -> None:
        # a tensor that is made of others, such as a moment in 8 bits, has no storage
        if not isinstance(t, Tensor) or not self._is_here(t) or is_traceable_wrapper_subclass(t):
            return
        if t.untyped_storage() in self._numbers:
            return
        storage = t.untyped_storage()
        number = self._numbers[storage] = len(self._sizes)
        self._sizes.append(0)
        self._owners.append(self._owner)
        self._set_size(number, storage.nbytes())
        weakref.finalize(storage, self._set_size, number, 0)

    def _set_size(self, number: int, size: int) -> None:
        if size != self._sizes[number]:
            self.memory.append((number, size - self._sizes[number], self.phase))
            self.parts.append(self.part)
            self._sizes[number] = size

    def peaks(self, kinds: Mapping[int, str]) -> dict[tuple[str, str], Counter[str]]:
        """(phase, part) -> bytes of each kind when most memory was in use in it.

        Args:
            kinds: of storages, by number. Of the others, those made in phase "forward" that outlive it are
                "activations", those that FSDP gathers are "gathered", those made within the head are "logits", and the
                rest is "scratch".
        """
        made: dict[int, str] = {}
        ended: dict[int, str] = {}
        for number, change, phase in self.memory:
            made.setdefault(number, phase)
            if change < 0:
                ended[number] = phase

        def kind(number: int) -> str:
            if number in kinds or number in self.regathered:
                return kinds.get(number, "gathered")
            if made[number] == "forward" and ended.get(number) != "forward":
                return "activations"
            return "logits" if self._owners[number] in HEADS else "scratch"

        used: Counter[str] = Counter()
        highest: dict[tuple[str, str], Counter[str]] = {}
        for (number, change, phase), part in zip(self.memory, self.parts):
            used[kind(number)] += change
            if (phase, part) not in highest or used.total() > highest[phase, part].total():
                highest[phase, part] = used.copy()
        return highest

    def peak(self, kinds: Mapping[int, str]) -> dict[str, int]:
        """Bytes of each kind when most memory was in use, and their "total"."""
        highest = max(self.peaks(kinds).values(), key=lambda used: used.total(), default=Counter())
        return dict(highest) | {"total": highest.total()}


@functools.cache
def _is_composed(func: torch._ops.OpOverload) -> bool:
    """Whether an operation of aten is nothing but others; a build without CUDA knows the CPU's kernels alone."""

    def has_kernel(key: str) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)

    composed = func.namespace == "aten" and has_kernel("CompositeImplicitAutograd")
    return composed and not has_kernel("CPU") and not has_kernel("CUDA")


def _is_real(name: str, tensors: list[Tensor]) -> bool:
    """Whether an operation follows from real tensors alone; ranges are real."""
    return name == "arange" if not tensors else not any(isinstance(t, FakeTensor | DTensor) for t in tensors)


def _matmul_flops(name: str, tensors: list[Tensor]) -> int:
    first = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}.get(name.rstrip("_"))
    return 0 if first is None else 2 * tensors[first].numel() * tensors[first + 1].shape[-1]


def _list_launches(args: tuple) -> int:
    """How many launches torch makes of an operation on lists of tensors; 1 for any other."""
    lists = [arg for arg in args if isinstance(arg, list | tuple) and arg and isinstance(arg[0], Tensor)]
    if not lists or len(lists[0]) < LIST_LIMITS[5]:
        return 1
    chunks = sum(-(-t.numel() // CHUNK) for t in lists[0])
    return max(-(-len(lists[0]) // LIST_LIMITS[min(len(lists), 5)]), -(-chunks // CHUNKS))
