"""A plan in a process that sees no GPU: a fake one takes the place of what torch would use."""

import json
import os
import pickle
import subprocess
import sys
from typing import Any

import torch

from minorca.config import Config
from minorca.errors import UserError
from minorca.model.architecture import Architecture
from minorca.plan.devices import Machine
from minorca.plan.fake_device import unavailable
from minorca.plan.report import make_plan

# what torchrun and a scheduler tell a rank
_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def plan_apart(config: Config, arch: Architecture, device: Machine, ranks: int, whole: bool = True) -> dict[str, Any]:
    """`make_plan`, in a process of its own where this one sees a GPU. Raises UserError: there can be no plan here."""
    if device.arch and torch.cuda.is_available():
        return PlanProcess(config, arch, device, ranks, whole).result()
    if device.arch and (reason := unavailable()):
        raise UserError(reason)
    return make_plan(config, arch, device, ranks, whole)


class PlanProcess:
    """A plan that is computed meanwhile."""

    def __init__(self, config: Config, arch: Architecture, device: Machine, ranks: int, whole: bool = True):
        environment = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
        path = os.pathsep.join(filter(None, sys.path))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "minorca.plan.apart", pickle.dumps((config, arch, device, ranks, whole)).hex()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # signals of the terminal are for the run
            start_new_session=True,
            env=environment | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path},
        )

    def result(self, timeout: float | None = None) -> dict[str, Any]:
        """Raises UserError: there can be no plan here, or it takes longer than so many seconds."""
        try:
            out, err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.close()
            raise UserError(f"the plan took more than {timeout} seconds") from None
        if self.process.returncode:
            lines = err.strip().splitlines() or [f"status {self.process.returncode}"]
            # torch puts the rank before every line of a traceback
            raise UserError(lines[-1].rpartition("[rank0]: ")[2])
        return json.loads(out)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def main() -> None:
    config, arch, device, ranks, whole = pickle.loads(bytes.fromhex(sys.argv[1]))
    if reason := unavailable():
        sys.exit(reason)
    try:
        print(json.dumps(make_plan(config, arch, device, ranks, whole)))
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
