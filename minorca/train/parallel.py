"""One run on any number of processes: who we are, what is sharded, what is computed again. Applied to a model from outside.

`none` keeps the model whole on each rank, unwrapped, and sums the adapters' gradients in one all-reduce a step: FSDP2 on
an (N, 1) mesh would do the same but copies every frozen weight twice a micro-batch even where there is nothing to gather.
`fsdp` shards every block, and the root with embedding, final norm and head, over a named (replicate, shard) mesh.
"""

import contextlib
import datetime
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from minorca.config import ParallelConfig
from minorca.errors import RunEnded, UserError
from minorca.model.network import Mistral
from minorca.signals import Terminated, signals_noted
from minorca.train.rank_monitor import RankMonitor


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int
    size: int
    device: torch.device
    watch: RankMonitor | None = None  # None: there are no others

    def sum(self, values: list[float]) -> list[float]:
        """Each value's sum over the ranks, in fp64. Every rank must call it."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def differing(self, values: dict[str, object]) -> list[str]:
        """The keys whose values are not the same on all ranks. Every rank must call it, with the same keys."""
        digests = [
            int(hashlib.sha256(json.dumps(item).encode()).hexdigest()[:10], 16) for item in values.items()
        ]  # 40 bits sum exactly
        return [key for key, digest, total in zip(values, digests, self.sum(digests)) if total != digest * self.size]

    def meet(self, where: str) -> None:
        """Waits for all ranks without a time limit: what they do before may take one much longer than another."""
        if self.watch:
            self.watch.meet(where)

    def doing(self, what: str) -> None:
        """Tells the other ranks what this one is at, for the message if it is the last they hear of it."""
        if self.watch:
            self.watch.doing = what


@contextlib.contextmanager
def joined(timeout: int) -> Iterator[World]:
    """Within it, this process is in the group torchrun describes, or in one of its own: nccl on CUDA, gloo on the CPU.

    A collective that takes longer than `timeout` seconds fails. When a rank leaves, by whatever error or signal, all others
    leave too.

    Raises:
        RunEnded: another rank left; or said the very words before that this one would end with.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda and device.index >= torch.cuda.device_count():
        raise UserError(
            f"rank {os.environ.get('RANK')} is the {device.index + 1}th of this machine, which has {torch.cuda.device_count()} GPUs; lower --nproc-per-node"
        )
    if cuda:
        torch.cuda.set_device(device)
    group = {"backend": "cuda:nccl,cpu:gloo" if cuda else "gloo", "timeout": datetime.timedelta(seconds=timeout)}
    if "RANK" in os.environ:
        dist.init_process_group(**group)
    else:
        dist.init_process_group(**group, store=dist.HashStore(), rank=0, world_size=1)
    rank, size = dist.get_rank(), dist.get_world_size()
    watch = RankMonitor(rank, size, timeout, device) if size > 1 else None
    try:
        yield World(rank, size, device, watch)
        dist.barrier()  # gloo aborts processes that leave while others still talk
        dist.destroy_process_group()
    except BaseException as error:
        if not watch:
            dist.destroy_process_group()
            raise
        with (
            signals_noted()
        ):  # when a rank dies, torchrun tells the others to end: not before they have said whom they miss
            raise _leaving(
                error, watch
            )  # nccl's group would wait for the others before it is destroyed; the process ends anyway
    finally:
        if watch:
            watch.close()


def _leaving(error: BaseException, watch: RankMonitor) -> BaseException:
    """Tells the other ranks of an error that ends this one; gives what to end with: the error, or why it is another's."""
    with contextlib.suppress(dist.DistError):  # the store may be what is lost
        if isinstance(error, UserError):
            mine = watch.first_to_say(str(error))
            watch.leave(2, "")
            watch.linger()
            return error if mine else RunEnded(2)
        if isinstance(
            error, KeyboardInterrupt | Terminated
        ):  # from the user; or from torchrun, because another rank died
            why = watch.who_left(signalled=True)
            watch.leave(130 if isinstance(error, KeyboardInterrupt) else 143, "")
            return why or error
        if (
            isinstance(error, RuntimeError)
            and not isinstance(error, torch.OutOfMemoryError)
            and (why := watch.who_left())
        ):
            words = f"{why} (its own error: {error})".partition("\n")[0] if str(why) else ""
            return RunEnded(why.status, words)
        watch.leave(1, f"{type(error).__name__}: {error}".partition("\n")[0])
        error.add_note(f"The other ranks: {watch.whereabouts()}")
    return error


def _memory_per_rank(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return whole // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def shards(model: nn.Module, config: ParallelConfig, world: World) -> bool:
    """Whether the model is to be sharded; `auto`: where its weights take half of a rank's memory, or an option needs it."""
    if config.shard != "auto":
        return config.shard == "fsdp"
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    needed = config.replicate > 1 or config.cpu_offload or 2 * weights >= _memory_per_rank(world.device)
    return world.sum([needed])[0] > 0  # ranks may differ in memory, and must not differ in this


def shard(model: Mistral, config: ParallelConfig, world: World) -> None:
    """FSDP2 on a model on the meta device: frozen weights in their dtype, adapters fp32, reductions fp32, sums not means."""
    if world.size % config.replicate:
        raise UserError(
            f"parallel.replicate is {config.replicate}; expected a divisor of the number of ranks, {world.size}"
        )
    names, sizes = ("replicate", "shard"), (config.replicate, world.size // config.replicate)
    mesh = init_device_mesh(world.device.type, sizes, mesh_dim_names=names)
    offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if config.cpu_offload else OffloadPolicy()
    # RoPE's tables are inputs of a block and stay fp32, so inputs are not cast
    precision = MixedPrecisionPolicy(model.embedding.weight.dtype, torch.float32, cast_forward_inputs=False)
    for module in (*model.layers, model):
        fully_shard(
            module, mesh=mesh if config.replicate > 1 else mesh["shard"], mp_policy=precision, offload_policy=offload
        )
        # the loss is already divided by the step's global token count; gloo has no pre-multiplied sum
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)


def describe(model: Mistral, world: World) -> str:
    """What a run holds, in words: parameters, trained ones, and the weights' bytes on this rank beside its memory."""
    parameters = list(model.parameters())
    whole, trained = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    here = sum(
        p.numel() * p.element_size() for p in (p.to_local() if isinstance(p, DTensor) else p for p in parameters)
    )
    how = "sharded" if isinstance(parameters[0], DTensor) else "whole"
    ranks = f"{world.size} rank{'s' * (world.size > 1)} on {world.device.type}"
    return f"{whole:,} parameters, {trained:,} trained; {ranks}, each with {here / 1e9:.2f} GB of weights ({how}) in {_memory_per_rank(world.device) / 1e9:.0f} GB"


def checkpoint_activations(model: Mistral, kind: str) -> None:
    """`full`: a block keeps its input and computes the rest again in backward. `selective`: it also keeps attention's output and
    those of the adapted projections that are not much wider than their input; of products with adapters, gate_up alone is made
    again."""
    if kind == "none":
        return
    aten, ours = torch.ops.aten, torch.ops.minorca
    attention = {
        getattr(aten, f"_scaled_dot_product_{name}").default
        for name in ("flash_attention", "efficient_attention", "cudnn_attention")
    }
    attention.add(ours.attention.default)
    if hasattr(torch.ops.torch_attn, "_varlen_attn"):
        attention.add(torch.ops.torch_attn._varlen_attn.default)

    def policy(_, operator, *arguments, **options) -> CheckpointPolicy:
        keep = operator in attention
        if operator == ours.lora_linear.default:
            w = arguments[1]
            keep = len(w) <= 2 * w.shape[1]
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    options = (
        {"context_fn": functools.partial(create_selective_checkpoint_contexts, policy)} if kind == "selective" else {}
    )
    for block in model.layers:
        block.forward = functools.partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, **options
        )


def sum_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """What FSDP does for its own: gradients summed over the ranks, of an unsharded model in one all-reduce."""
    gradients = [p.grad for p in parameters if not isinstance(p, DTensor)]
    if world.size == 1 or not gradients:
        return
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(summed.view_as(gradient))


def whole(tensor: Tensor, world: World) -> Tensor | None:
    """A tensor, sharded or not, whole on the host of rank 0; None on the others. Every rank must call it."""
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().cpu() if world.rank == 0 else None
