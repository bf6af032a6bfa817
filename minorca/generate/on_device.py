"""Copies between host and device that nothing waits for, and how many rows a product takes."""

import torch
from torch import Tensor


def copy_to(device: torch.device, t: Tensor) -> Tensor:
    """A tensor of the host on the device; on CUDA the host goes on before it is there."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)


def to_host(t: Tensor) -> Tensor:
    """A copy on the host; on CUDA it is complete when the stream has come so far."""
    if not t.is_cuda:
        return t.clone()
    return torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)


def row_multiple(device: torch.device) -> int:
    """What the number of rows of a prompt's products is filled up to a multiple of.

    On the CPU, torch's products of fewer than 12 rows sum in other orders than those of more; from there on a row's
    result does not depend on their number.
    """
    return 1 if device.type == "cuda" else 16
