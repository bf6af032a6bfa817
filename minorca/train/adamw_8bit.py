"""AdamW with moments in 8 bits: torchao's, whose blocks are laid so that moments are saved and sharded by rows.

Source: Dettmers et al. 2022 (arXiv:2110.02861). The values of a block share a scale, the largest of their magnitudes.
torchao's blocks of 256 run through a rank's whole part of a parameter, and small parts have fp32 moments: on another
number of ranks they would be other blocks. Here a row consists of whole blocks, of the largest power of two that
divides it and is at most 256, so that its moments are the same on any number of ranks. Vectors, and rows that 16 does
not divide, have fp32 moments. Axes: N rows, K columns, B blocks of a row.
"""

import contextlib
import logging
import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes

from minorca_kernels import local_tensor

# it warns of kernels that an optimizer does not use, for GPUs that this machine may not have
logging.getLogger("torchao").setLevel(logging.ERROR)

# not among the requirements
from torchao.optim import AdamW8bit as TorchaoAdamW  # noqa: E402  # pyright: ignore[reportMissingImports]
from torchao.optim.subclass_8bit import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    OptimState8bit,
    get_qmap_signed,
    get_qmap_unsigned,
)

# The values of its codes, which it computes once: not on the fake tensors of a plan, whose numbers are none.
with _disable_current_modes():
    get_qmap_signed()
    get_qmap_unsigned()

# the scale of a block takes 4 bytes
MIN_BLOCK = 16


class AdamW8bit(TorchaoAdamW):
    """torchao's AdamW8bit, with blocks within rows; its moments are codes [N, K] and scales [N, B], or fp32 [N, K]."""

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        """A moment of a parameter, all zeros: torchao calls this before the first update."""
        local = local_tensor(p)
        block = self._block(p)
        if not block or not len(local):
            return torch.zeros_like(p, requires_grad=False)
        zeros = OptimState8bit.zeros(local.shape, signed, block, local.device, local.dtype)
        if not isinstance(p, DTensor):
            return zeros
        sharded = DTensor.from_local(
            zeros, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )
        # shards that are offloaded to the host, where from_local does not leave them
        return sharded.to(p.device)

    def _block(self, p: Tensor) -> int:
        """The number of values that share a scale; 0: the moments are fp32."""
        block = math.gcd(p.shape[-1], self.block_size)
        return block if p.ndim == 2 and block >= MIN_BLOCK else 0

    def step(self, closure: Any = None) -> Any:
        # to compile it for a CPU takes a C++ compiler, and longer than a short run
        on_cpu = not self.param_groups[0]["params"][0].is_cuda
        with torch.compiler.set_stance("force_eager") if on_cpu else contextlib.nullcontext():
            return super().step(closure)

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """Copies of a parameter's moments, sharded as it is; zeros before the first update."""
        copies = {}
        for name, moment in self._moments(parameter).items():
            copies |= self._empty(parameter, name)
            local: Any = local_tensor(moment)
            if isinstance(local, OptimState8bit):
                local_tensor(copies[name]).copy_(local.codes)
                local_tensor(copies[f"{name}_scales"]).copy_(local.scale.view(len(local), -1))
            else:
                local_tensor(copies[name]).copy_(local)
        return copies

    def _moments(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state.get(parameter) or {}
        return {
            name: state[name] if name in state else self._new_buffer(parameter, signed)
            for name, signed in (("exp_avg", True), ("exp_avg_sq", False))
        }

    def _empty(self, parameter: Tensor, name: str) -> dict[str, Tensor]:
        """The tensors of a moment, sharded as the parameter."""
        block = self._block(parameter)
        if not block:
            return {name: torch.zeros_like(parameter, requires_grad=False)}
        scales = torch.zeros_like(parameter.detach()[:, : parameter.shape[1] // block])
        return {name: torch.zeros_like(parameter, dtype=torch.uint8, requires_grad=False), f"{name}_scales": scales}

    def set_moments(self, parameter: Tensor, moments: dict[str, Tensor], updates: int) -> None:
        """Sets what `moments` gave after so many updates."""
        state = self._moments(parameter)
        for name, moment in state.items():
            local: Any = local_tensor(moment)
            if isinstance(local, OptimState8bit):
                local.codes.copy_(local_tensor(moments[name]))
                local.scale.copy_(local_tensor(moments[f"{name}_scales"]).flatten())
            else:
                local.copy_(local_tensor(moments[name]))
        self.state[parameter] = {"step": torch.tensor(float(updates)), **state}
