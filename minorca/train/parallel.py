"""How a model is spread over the ranks, and which activations are computed again. Applied to a model from outside.

`none` keeps the model whole on each rank, unwrapped, and sums the trained gradients in one all-reduce a step: FSDP2 on
an (N, 1) mesh would do the same, but copies every frozen weight twice a micro-batch even where there is nothing to
gather.
`fsdp` shards every block, and the root with embedding, final norm and head, over a named (replicate, shard) mesh.
"""

import functools
import os
from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from minorca.config import ParallelConfig
from minorca.errors import UserError
from minorca.host import host_memory_bytes
from minorca.model.attention import varlen_attn
from minorca.model.network import Mistral
from minorca.train.offload import HostMemory, input_on_host
from minorca.train.ranks import World, lift_timeouts
from minorca_kernels import NF4Weight, is_sharded, local_tensor


def memory_per_rank(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return host_memory_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def shards(model: nn.Module, config: ParallelConfig, world: World) -> bool:
    """Whether the model is to be sharded; `auto`: where an option needs it, or where its weights take half of the
    memory of each of several ranks. A single rank would only copy every weight, and store the same.
    """
    if config.shard != "auto":
        return config.shard == "fsdp"
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    too_large = world.size > 1 and 2 * weights >= memory_per_rank(world.device)
    needed = config.replicate > 1 or config.cpu_offload or too_large
    # ranks may differ in memory, and must not differ in this
    return world.sum([needed])[0] > 0


def shard(model: Mistral, config: ParallelConfig, world: World, dtype: torch.dtype) -> None:
    """FSDP2 on a model on the meta device: parameters are stored in their dtype and gathered in `dtype`; reductions are
    fp32, sums not means.
    """
    if world.size % config.replicate:
        message = f"is {config.replicate}; expected a divisor of the number of ranks, {world.size}"
        raise UserError(message, field="parallel.replicate")
    sizes = (config.replicate, world.size // config.replicate)
    mesh = init_device_mesh(world.device.type, sizes, mesh_dim_names=("replicate", "shard"))
    lift_timeouts(world.device)
    offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if config.cpu_offload else OffloadPolicy()
    # RoPE's tables are inputs of a block and stay fp32, so inputs are not cast
    precision = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    mesh = mesh if config.replicate > 1 else mesh["shard"]
    model.gathered_dtype = dtype
    for module in (*model.layers, model):
        sharded = shard_parameters(module, mesh=mesh, mp_policy=precision, offload_policy=offload)
        # the loss is already divided by the step's global token count; gloo has no pre-multiplied sum
        sharded.set_force_sum_reduction_for_comms(True)
        sharded.set_gradient_divide_factor(1.0)


def shard_parameters(module: nn.Module, **options) -> FSDPModule:
    """`fully_shard`, which in torch 2.11 does not know of parameters that are bytes: it lets every shard require
    gradients until it is told that it does not, and casts all parameters to the dtype of its mixed precision.
    """
    if torch.__version__ >= "2.13":
        return fully_shard(module, **options)

    def parameter(data: Tensor, requires_grad: bool = True) -> nn.Parameter:
        return nn.Parameter(data, requires_grad and data.is_floating_point())

    with mock.patch.object(_fsdp_param, "nn", SimpleNamespace(Parameter=parameter, Module=nn.Module)):
        sharded = fully_shard(module, **options)
    group = sharded._get_fsdp_state()._fsdp_param_group
    for one in group.fsdp_params if group else ():
        if not one.sharded_param.is_floating_point():
            one.init_dtype_attrs = lambda mp_policy, one=one: type(one).init_dtype_attrs(one, MixedPrecisionPolicy())
    return sharded


def describe(model: Mistral, world: World) -> str:
    """Parameters, trained ones, and the weights' bytes on this rank beside its memory, in words."""
    parameters = list(model.parameters())
    count = sum(p.numel() for p in parameters)
    for weight in model.modules():
        if isinstance(weight, NF4Weight):
            count += weight.out_features * weight.in_features - sum(p.numel() for p in weight.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    local = map(local_tensor, parameters)
    gigabytes = sum(p.numel() * p.element_size() for p in local) / 1e9
    how = "sharded" if is_sharded(parameters[0]) else "whole"
    ranks = f"{world.size} rank{'s' if world.size > 1 else ''} on {world.device.type}"
    memory = f"{gigabytes:.2f} GB of weights ({how}) in {memory_per_rank(world.device) / 1e9:.0f} GB"
    return f"{count:,} parameters, {trained:,} trained; {ranks}, each with {memory}"


def checkpoint_activations(model: Mistral, kind: str) -> None:
    """Has blocks recompute activations in backward instead of saving them.

    `full`: a block saves its input alone. `offload`: it saves that in host memory. `selective`: it also saves
    attention's output and those of the trained or adapted projections that are not much wider than their input; of
    these products, gate_up alone is recomputed.
    """
    if kind == "none":
        return
    options = {}
    if kind == "selective":
        # beside adapters the embedding may be trained too, but no norm
        policy = functools.partial(_selective_policy, model.norm.weight.requires_grad)
        # `_summed` overwrites a saved result that nothing reads again
        contexts = functools.partial(create_selective_checkpoint_contexts, policy, allow_cache_entry_mutation=True)
        options = {"context_fn": contexts}
    memory = HostMemory()
    for block in model.layers:
        forward = functools.partial(
            checkpoint,
            functools.partial(_summed, block.forward),
            use_reentrant=False,
            preserve_rng_state=False,
            **options,
        )
        block.forward = functools.partial(input_on_host, forward, memory) if kind == "offload" else forward


def _summed(forward: Callable, *arguments) -> tuple[Tensor, None]:
    """A block's forward that leaves nothing to be added: of the next block's input one tensor is saved, not two.

    The sum takes the place of what is added: selective checkpointing has saved that, though backward never reads it.
    """
    x_TH, update_TH = forward(*arguments)
    return x_TH if update_TH is None else update_TH.add_(x_TH), None


@functools.cache
def _attention_operators() -> set:
    names = ("flash_attention", "efficient_attention", "cudnn_attention")
    operators = {getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default for name in names}
    operators.add(torch.ops.minorca.attention.default)
    if varlen_attn() is not None:
        operators.add(torch.ops.torch_attn._varlen_attn.default)
    return operators


def _selective_policy(full: bool, _, operator, *arguments, **options) -> CheckpointPolicy:
    """full: all weights are trained, and projections are plain products."""
    save = operator in _attention_operators()
    if operator == torch.ops.minorca.lora_linear.default:
        out_features, a = arguments[3], arguments[4]
        save = out_features <= 2 * a.shape[1]
    elif full and operator == torch.ops.aten.mm.default:
        in_features, out_features = arguments[1].shape
        save = out_features <= 2 * in_features
    return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE
