"""Any number of ranks, sharded or not, gives one rank's losses, and a run resumes on another number of ranks."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from minorca.train import __main__ as train_command
from minorca.train import checkpoint
from tests.helpers import assert_same_bits, assert_same_run, lines_of, relative_error, torchrun, wait_until

# 3 micro-batches a step, so that in every step one of two ranks has a micro-batch less than the other
RANKED = {"train.steps": 20, "train.batch_tokens": 384, "data.eval": 0.1, "optim.lr": 0.003}


def test_two_ranks_give_one_ranks_losses(workplace, tmp_path):
    """One case of the matrix below."""
    train_command.main(workplace("one", **RANKED))
    torchrun(2, workplace("two", **RANKED, **{"parallel.shard": "fsdp"}))
    assert_same_run(tmp_path / "one", tmp_path / "two", losses=1e-6)


SHARDINGS = {
    "none": {"shard": "none"},
    "auto": {},
    "fsdp": {"shard": "fsdp"},
    "offload": {"shard": "fsdp", "cpu_offload": "true"},
    "replicas": {"shard": "fsdp", "replicate": 2},
}
RECOMPUTE = ("none", "selective", "full")


@pytest.mark.slow
def test_the_matrix_of_ranks(workplace, tmp_path):
    """1, 2 and 4 ranks, with every sharding and every activation checkpointing, each two of them together in some run:
    one rank's losses and adapters.
    """
    train_command.main(workplace("one", **RANKED))
    runs = [
        (ranks, sharding, RECOMPUTE[(i + j) % 3])
        for i, ranks in enumerate((1, 2, 4))
        for j, sharding in enumerate(SHARDINGS)
        if ranks > 1 or sharding != "replicas"
    ]
    for ranks, sharding, recompute in [*runs, (2, "replicas", "selective")]:
        name = f"{ranks}-{sharding}-{recompute}"
        options = {f"parallel.{key}": value for key, value in SHARDINGS[sharding].items()}
        torchrun(ranks, workplace(name, **RANKED | options | {"parallel.activation_checkpointing": recompute}))
        try:
            assert_same_run(tmp_path / "one", tmp_path / name, losses=1e-6)
        except AssertionError as error:
            raise AssertionError(name) from error


@pytest.mark.slow
def test_two_ranks_keep_the_best_and_stop_early_as_one_does(workplace, tmp_path):
    """Sharded: what is kept is gathered by both. On so few rows the held-out loss soon rises."""
    settings = RANKED | {"train.eval_every": 1, "train.keep_best": "true", "train.early_stopping": 4}
    settings |= {"data.limit": 16, "data.eval": 0.5, "optim.lr": 0.03, "optim.schedule": "constant"}
    train_command.main(workplace("one", **settings))
    torchrun(2, workplace("two", **settings, **{"parallel.shard": "fsdp"}))
    best, steps, adapters = [], [], []
    for run in (tmp_path / "one", tmp_path / "two"):
        best.append(json.loads((run / "adapter" / "best.json").read_text()))
        steps.append([line["step"] for line in lines_of(run) if "loss" in line])
        adapters.append(load_file(run / "adapter" / "adapter_model.safetensors"))
    assert steps[0] == steps[1] and best[0]["step"] == best[1]["step"] == len(steps[0]) - 4 < 16
    assert best[1]["eval_loss"] == pytest.approx(best[0]["eval_loss"], rel=1e-3)
    assert max(relative_error(adapters[1][name], tensor) for name, tensor in adapters[0].items()) < 1e-2


@pytest.mark.slow
def test_bf16_weights_with_fp32_adapters_shard(workplace, tmp_path):
    """The losses differ by the rounding of bf16 sums in another order alone; the saved adapters are fp32."""
    settings = RANKED | {"model.dtype": "bfloat16", "train.steps": 5}
    train_command.main(workplace("one", **settings))
    torchrun(2, workplace("two", **settings, **{"parallel.shard": "fsdp"}))
    for a, b in zip(lines_of(tmp_path / "one"), lines_of(tmp_path / "two")):
        for key in {"loss", "grad_norm", "eval_loss"} & a.keys():
            assert b[key] == pytest.approx(a[key], rel=5e-3), (a["step"], key)
    saved = load_file(tmp_path / "two" / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(2, 1), (1, 4), (4, 2)])
def test_a_run_resumes_on_another_number_of_ranks(before, after, workplace, tmp_path):
    """8 steps on `before` ranks, the rest on `after` ranks: the same rows in the same steps.

    The first ten losses after resuming agree within 1e-6.
    """
    settings = RANKED | {"train.checkpoint_every": 8}
    torchrun(before, workplace("one", **settings, **{"parallel.shard": "fsdp" if before > 1 else "none"}))
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    for path in checkpoint.published(tmp_path / "moved" / "checkpoints")[1:]:
        shutil.rmtree(path)
    shutil.rmtree(tmp_path / "moved" / "adapter")
    torchrun(after, workplace("moved", **settings, **{"parallel.shard": "fsdp" if after > 1 else "none"}))
    assert_same_run(tmp_path / "one", tmp_path / "moved")
    for a, b in zip(lines_of(tmp_path / "one"), lines_of(tmp_path / "moved")):
        if "loss" in a and a["step"] <= 18:
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-6), a["step"]


# -------------------------------------------------------------------------------------------------------- several nodes


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def node(options: list[str], endpoint: str, restarts: int) -> subprocess.Popen:
    """The torchrun of one machine, with one rank, as examples/slurm.sbatch starts it."""
    command = [
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc-per-node=1",
        f"--max-restarts={restarts}",
        "--rdzv-id=7",
    ]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "-m", "minorca.train", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *command], env=environment, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.slow
def test_two_nodes_give_one_ranks_losses(workplace, tmp_path):
    """Two torchrun agents with a rendezvous on the loopback interface."""
    train_command.main(workplace("one", **RANKED))
    endpoint = f"127.0.0.1:{free_port()}"
    nodes = [node(workplace("two", **RANKED, **{"parallel.shard": "fsdp"}), endpoint, restarts=0) for _ in range(2)]
    errors = [process.communicate(timeout=240)[1] for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0], errors
    assert_same_run(tmp_path / "one", tmp_path / "two", losses=1e-6)


def children(process: subprocess.Popen) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
    return list(map(int, found.split()))


@pytest.mark.slow
def test_a_rank_that_dies_on_one_node_is_restarted_on_both(workplace, tmp_path):
    """The run resumes from the newest checkpoint to the same bits."""
    settings = RANKED | {"train.steps": 150, "train.checkpoint_every": 5}
    torchrun(2, workplace("whole", **settings))
    endpoint = f"127.0.0.1:{free_port()}"
    nodes = [node(workplace("killed", **settings), endpoint, restarts=3) for _ in range(2)]
    metrics = tmp_path / "killed" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count('"loss"') >= 12, 120)
    os.kill(children(nodes[1])[0], signal.SIGKILL)
    errors = [process.communicate(timeout=240)[1] for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0], errors
    assert_same_bits(tmp_path / "whole", tmp_path / "killed")
