"""The device that a command runs on, checked before it does any work."""

import shutil
import sysconfig
import warnings
from pathlib import Path

import torch
import triton

from minorca.errors import UserError

ON_THE_CPU = "set CUDA_VISIBLE_DEVICES= (empty) to run on the CPU"


def has_gpu() -> bool:
    """Whether there is a GPU to run on.

    Raises:
        UserError: there is one, and its driver cannot be used.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    # torch says so in a warning, and has commands go on without the GPU
    for warning in caught:
        message = str(warning.message)
        if "CUDA initialization" in message:
            raise UserError(f"the GPU cannot be used: {message.partition(' (Triggered')[0]}; {ON_THE_CPU}")
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return available


def default_device(index: int = 0) -> torch.device:
    """The GPU of this index, checked, or the CPU where there is none.

    Raises:
        UserError: the GPU, or what compiles kernels for it, is not what our kernels need.
    """
    if not has_gpu():
        return torch.device("cpu")
    device = torch.device("cuda", index)
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        name = f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}"
        raise UserError(f"{name}; expected 8.0 or higher (NVIDIA's Ampere, with bf16); {ON_THE_CPU}")
    _check_triton()
    return device


def _check_triton() -> None:
    """Compiles what launches kernels, which Triton would else do at the first launch."""
    try:
        # the attribute compiles it
        triton.runtime.driver.active.get_current_target()
    # by what is missing: RuntimeError, AssertionError, CalledProcessError, OSError
    except Exception as error:
        missing = []
        if not any(map(shutil.which, ("cc", "gcc", "clang"))):
            missing.append("a C compiler (Debian's package gcc)")
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            missing.append("Python's headers (Debian's package python3-dev)")
        advice = f"install {' and '.join(missing)}" if missing else "set CC to a working C compiler"
        reason = str(error).partition("\n")[0]
        raise UserError(f"Triton cannot compile GPU kernels: {reason}; {advice}, or {ON_THE_CPU}") from error
