"""AdamW, the learning rate as a function of the step, and clipping."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from minorca.config import OptimConfig, warmup_steps


def adamw(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, config.lr, config.betas, config.eps, config.weight_decay, fused=True)


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
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
