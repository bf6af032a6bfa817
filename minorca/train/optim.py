"""AdamW, the learning rate as a function of the step, and clipping."""

import importlib.util
import math
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minorca.config import OptimConfig, warmup_steps
from minorca.errors import UserError
from minorca_kernels import is_sharded


class Optimizer(Protocol):
    """An optimizer of torch, with what checkpoints need."""

    param_groups: list[dict[str, Any]]
    state: Any

    def step(self) -> Any: ...

    def zero_grad(self) -> None: ...

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """A parameter's moments by name, each in one tensor or several, sharded as it is; zeros before the first
        update.
        """
        ...

    def set_moments(self, parameter: Tensor, moments: dict[str, Tensor], updates: int) -> None:
        """Sets what `moments` gave after so many updates; the tensors are no longer the caller's."""
        ...


# torch divides an operation on more values than these among the threads of a CPU (at::internal::GRAIN_SIZE); its fused
# optimizers divide any.
GRAIN_SIZE = 32768


class AdamW(torch.optim.AdamW):
    """torch's. On a CPU small parameters, as of adapters, are all updated by one thread: with more, these would begin
    and end together for each of them.
    """

    def step(self, closure: Any = None) -> Any:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if parameters[0].is_cuda or any(parameter.numel() > GRAIN_SIZE for parameter in parameters):
            return super().step(closure)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return super().step(closure)
        finally:
            torch.set_num_threads(threads)

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state.get(parameter) or {}
        names = ("exp_avg", "exp_avg_sq")
        return {name: state[name] if name in state else torch.zeros_like(parameter) for name in names}

    def set_moments(self, parameter: Tensor, moments: dict[str, Tensor], updates: int) -> None:
        self.state[parameter] = {"step": torch.tensor(float(updates), device=parameter.device), **moments}


def adamw(parameters: Iterable[nn.Parameter], config: OptimConfig) -> Optimizer:
    """AdamW, its moments in fp32 or in 8 bits."""
    settings = (config.lr, config.betas, config.eps, config.weight_decay)
    if config.name == "adamw":
        return AdamW(parameters, *settings, fused=True)
    # needs a package that is not among the requirements
    from minorca.train.adamw_8bit import AdamW8bit

    return AdamW8bit(parameters, *settings)


def check_optimizer(config: OptimConfig) -> None:
    """Raises UserError: a package is not installed."""
    if config.name == "adamw_8bit" and importlib.util.find_spec("torchao") is None:
        message = "is adamw_8bit, whose package is not installed; pip install torchao, or set it to adamw"
        raise UserError(message, field="optim.name")


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        # a compiled optimizer reads it from a tensor
        group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else lr


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Of step `step` in 1..steps: a linear rise over the warm-up, then the schedule, which ends just above min_lr."""
    warmup = warmup_steps(config, steps)
    if step <= warmup:
        return config.lr * step / warmup
    done = (step - warmup - 1) / max(1, steps - warmup)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return config.min_lr + (config.lr - config.min_lr) * factor[config.schedule]


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scales all gradients so that their common norm is at most max_norm; returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm, foreach=True)
    return (norm.full_tensor() if is_sharded(norm) else norm).item()
