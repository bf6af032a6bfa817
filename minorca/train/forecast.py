"""What a run will need, said and checked before its model is loaded, and what it needed."""

import contextlib
import logging
import os
from typing import Any

import numpy as np
import torch

from minorca.config import Config
from minorca.errors import UserError
from minorca.model.architecture import Architecture
from minorca.model.build import build_model
from minorca.plan.advice import changed
from minorca.plan.apart import PlanProcess
from minorca.plan.devices import here
from minorca.plan.estimate import model_of
from minorca.plan.report import advised, make_plan
from minorca.train import metrics
from minorca.train.revisions import pin

log = logging.getLogger("minorca.train")

# bytes of weights under which memory is no question
SMALL = 100e6
# a plan takes some seconds; one that takes longer is not waited for
TIMEOUT = 60


class Forecast:
    """The plan of this run, on rank 0. On a GPU it is computed in another process, while the data are read.

    A run never fails because it cannot be planned.
    """

    def __init__(self, config: Config):
        self.config = config
        self.ranks = int(os.environ.get("WORLD_SIZE", 1))
        self.plan: dict[str, Any] | None = None
        self.process: PlanProcess | None = None
        # what is wrong with the model or the GPU, the run itself says
        with contextlib.suppress(UserError):
            self.device = here(self.ranks)
            config, _ = pin(config)
            self.config, self.arch = model_of(config)
            if _weight_bytes(config, self.arch) >= SMALL:
                self._start()

    def _start(self) -> None:
        self.plan = None
        try:
            if self.device.arch:
                self.process = PlanProcess(self.config, self.arch, self.device, self.ranks, whole=False)
            else:
                self.plan = make_plan(self.config, self.arch, self.device, self.ranks, whole=False)
        # whatever a step on fake tensors may raise
        except Exception as error:
            _not_planned(error)

    def _wait(self) -> None:
        if self.process:
            try:
                self.plan = self.process.result(TIMEOUT)
            except UserError as error:
                _not_planned(error)

    def check(self, lengths: np.ndarray) -> None:
        """Logs the estimate.

        Args:
            lengths: tokens of the rows.

        Raises:
            UserError: the GPU is too small, with the settings that fit.
        """
        self._wait()
        if self.plan and not self.plan["fits"] and self.process:
            longest = int(lengths.max())
            size = min(self.config.train.micro_batch_tokens, max(longest, int(lengths.sum())))
            real = {"data.seq_len": longest, "train.micro_batch_tokens": size}
            # rows as long as they are, not as long as they may be
            if (config := changed(self.config, real)) != self.config:
                self.config = config
                self._start()
                self._wait()
        if not self.plan:
            return
        needed, memory = self.plan["memory_bytes"]["total"], self.device.memory
        log.info("estimate: %.2f GB of %.2f GB on each %s", needed / 1e9, memory / 1e9, self.device.name)
        if needed <= memory or not self.process:
            return
        ways = "; or ".join(advised(advice) for advice in self.plan["advice"][:3])
        advice = f"set {ways}" if ways else "use a GPU of more memory, or more of them"
        raise UserError(
            f"a step needs {needed / 1e9:.2f} GB on each GPU, and {self.device.name} has {memory / 1e9:.2f}: {advice}"
        )

    def report(self, device: torch.device) -> None:
        """Logs the measured peak of this rank beside the estimate."""
        measured = metrics.peak_memory_bytes(device)
        what = "of tensors" if device.type == "cuda" else "of the process, with Python and torch"
        estimate = f"; estimated {self.plan['memory_bytes']['total'] / 1e9:.2f} GB of tensors" if self.plan else ""
        log.info("peak memory: %.2f GB %s%s", measured / 1e9, what, estimate)

    def close(self) -> None:
        """Ends the other process, if it still runs."""
        if self.process:
            self.process.close()


def _weight_bytes(config: Config, arch: Architecture) -> int:
    model = build_model(arch, getattr(torch, config.model.dtype))
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _not_planned(error: Exception) -> None:
    log.info("no estimate of memory: %s", str(error).partition("\n")[0])
