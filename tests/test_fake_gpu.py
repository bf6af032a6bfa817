"""Steps of Mistral-7B on a fake GPU: what they wait for, launch and keep in memory, and how long they should take.

The bounds are a little above what is there: a change that costs launches, bytes or memory fails here, without a GPU.
"""

import json
from typing import Any

import pytest

from minorca.plan.fake_device import unavailable
from tests.kernels.test_compiled import run

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

SCRIPT = """
import contextlib, itertools, json, sys
from collections import Counter
import torch
from minorca.plan.fake_device import H100, fake_device
from benchmarks.fake_runs import Training, decode, train
from benchmarks.predict import decoding, of_copy, training
from minorca.plan.fake_step import extrapolated
from minorca.plan.rates import Prediction, Rates

def waits(run):
    return sorted({(wait.phase, wait.what) for wait in run.recorder.waits if wait.phase not in ("build", "first step")})

def per_layer(two, three, chosen):
    sizes = [[launch.bytes for launch in run.recorder.launches if chosen(launch)] for run in (two, three)]
    two, three = map(len, sizes)
    return {"launches": three - two, "bytes": sum(sizes[1]) - sum(sizes[0]), "rest": 3 * two - 2 * three}
"""

STEPS = """
runs = {layers: train(Training(layers, [8192])) for layers in (2, 3)}
kinds = [Training(2, [4096], checkpointing=kind) for kind in ("selective", "full", "offload")]
ranks = [Training(2, [4096], ranks=8), Training(2, [4096], checkpointing="full", ranks=8, replicate=2),
         Training(2, [4096], checkpointing="offload", ranks=8)]
dropped = {layers: train(Training(layers, [8192], dropout=0.05)) for layers in (2, 3)}
held = list(itertools.accumulate(change for _, change, phase in runs[2].recorder.memory if phase == "build"))
peaks = [runs[layers].peak for layers in (2, 3)]
quantized = {layers: train(Training(layers, [8192], quantize="nf4")) for layers in (2, 3)}

def seconds(runs):
    launches = extrapolated(runs.get, 32)
    step = {launch: n for launch, n in launches.items() if launch.phase in ("forward", "backward", "optimizer")}
    return Prediction(Counter(step), Rates(), 4.0 * 32 * 128 * 8192 * 8193 / 2).step_seconds

decoded = {layers: decode(layers, 1, 512) for layers in (2, 3)}
many = decode(2, 8, 512)
steps = {
    "waits": [waits(run) for run in (runs[2], dropped[2], quantized[2], *map(train, kinds + ranks))],
    "batch copies": {phase: runs[2].recorder.async_copies[phase] for phase in ("batch", "forward", "backward")},
    "rows": max(int(wait.what.split("[")[1].split(",")[0].split("]")[0]) for wait in runs[2].recorder.waits
                if wait.phase == "build" and "copy" in wait.what and "[4096]" not in wait.what),
    "beside weights": max(held) - held[-1],
    "peak": {kind: peaks[0][kind] + 30 * (peaks[1][kind] - peaks[0][kind]) for kind in peaks[0]},
    "training": {phase: per_layer(*runs.values(), lambda launch: launch.phase == phase)
                 for phase in ("forward", "backward")},
    "dropped": per_layer(*dropped.values(), lambda launch: launch.phase in ("forward", "backward")),
    "quantized": {"seconds": seconds(quantized) / seconds(runs), "peaks": [quantized[n].peak for n in (2, 3)]},
    "decoding": per_layer(*decoded.values(), lambda launch: launch.captured),
    "generating": [(wait.phase, wait.captured, wait.what) for run in (*decoded.values(), many)
                   for wait in run.recorder.waits if wait.phase == "decode" or wait.captured],
    "request copies": sum(wait.phase == "prefill" for wait in decoded[2].recorder.waits),
    "prefill launches": per_layer(*decoded.values(), lambda launch: launch.phase == "prefill")["launches"],
    "tokens per second": 8192 / training(Rates(), "packed, 683 a document", 16, 0.0, "own").step_seconds,
    "of copy": of_copy(decoding(Rates(), 1), 1),
}
"""

FAULTS = """
with fake_device(H100) as (world, recorder):
    x = torch.ones(4, 4, device=world.device)
    pinned = torch.ones(4).pin_memory().to(world.device, non_blocking=True)
    x.fill_(2.0)
    clean = len(recorder.waits)
    found = []
    for fault in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: x[0].copy_(torch.ones(4)), lambda: x.cpu(),
                  lambda: torch.tensor([1.0], device=world.device), lambda: x[0, 0].fill_(3) and bool(x[0, 0] > 1),
                  lambda: torch.cuda.synchronize(), lambda: x[x > 1]):
        before = len(recorder.waits)
        # what a fake tensor cannot compute is noted all the same
        with contextlib.suppress(Exception):
            fault()
        found.append(len(recorder.waits) > before)
    y = torch.empty(1000, device=world.device)
    sizes = [recorder.peak({})["total"]]
    y.untyped_storage().resize_(0)
    z = torch.empty(1000, device=world.device)
    sizes.append(recorder.peak({})["total"])
    y.untyped_storage().resize_(4000)
    sizes.append(recorder.peak({})["total"])
faults = {"clean": clean, "found": found, "copies": recorder.async_copies.total(), "sizes": sizes}
"""

PEAKS = """
cases = ((8192, "none"), (8192, "selective"), (8192, "full"), (8192, "offload"), (4096, "none"), (4096, "full"),
         (4096, "offload"))
peaks = [train(Training(32, [tokens], checkpointing=kind)).peak["total"] for tokens, kind in cases]
"""


def results_of(directory, script: str, name: str) -> Any:
    """The value of a name after a script, in a process of its own: torch answers there that CUDA exists."""
    path = directory / "script.py"
    path.write_text(f"{SCRIPT}{script}print(json.dumps({name}))")
    return json.loads(run(path, check=True).stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    return results_of(tmp_path_factory.mktemp("fake"), STEPS + FAULTS, '{"steps": steps, "faults": faults}')


def test_steps(found):
    """Training by each kind of checkpointing, on one rank, sharded and replicated; loading; decoding."""
    found = found["steps"]
    print(found)
    # a step waits once, for the norm that it clips to
    assert all(waits == [["optimizer", "_local_scalar_dense"]] for waits in found["waits"])
    # tokens and targets, and what attention knows of the documents
    assert found["batch copies"] == {"batch": 3, "forward": 4, "backward": 0}
    assert found["rows"] <= 1024 and found["beside weights"] < 0.3e9
    assert found["peak"]["total"] <= 40.8e9 and found["peak"]["scratch"] <= 0.6e9
    assert 20e9 < found["peak"]["activations"] <= 25e9 and 14e9 < found["peak"]["weights"] < 15e9
    assert 15 < found["training"]["forward"]["launches"] <= 23 and 25 < found["training"]["backward"]["launches"] <= 34
    assert sum(phase["bytes"] for phase in found["training"].values()) <= 10.7e9
    # dropout makes no pass over an activation, but those of the adapters' products, which each read it for themselves
    assert found["dropped"]["launches"] <= 70 and found["dropped"]["bytes"] <= 10.8e9
    assert 5 < found["decoding"]["launches"] <= 10 and found["decoding"]["rest"] <= 6
    assert found["generating"] == []
    assert found["request copies"] == 0 and found["prefill launches"] <= 23
    assert found["tokens per second"] >= 19_300 and found["of copy"] >= 0.79


def test_a_quantized_step(found):
    """QLoRA of 8,192 tokens takes at most 8% longer than LoRA in bf16, and keeps nothing for it: a layer's weights take
    4.127 bits each, all else as much memory, but for the values of one weight.
    """
    dense, quantized = found["steps"]["peak"], found["steps"]["quantized"]
    two, three = quantized["peaks"]
    layer = {kind: three[kind] - two[kind] for kind in two}
    assert 1 < quantized["seconds"] <= 1.04
    assert layer["weights"] == pytest.approx(218.1e6 * 4.127 / 8, rel=1e-3)
    assert two["activations"] + 30 * layer["activations"] == dense["activations"]
    # and the values of the one weight that is multiplied: at the peak, down's
    assert two["scratch"] + 30 * layer["scratch"] <= 1.01 * dense["scratch"] + 2 * 4096 * 14336


def test_faults_are_seen(found):
    """Every wait is noted, and no other; storages that FSDP empties do not count."""
    found = found["faults"]
    assert found["clean"] == 0 and found["copies"] == 1 and all(found["found"]), found
    assert found["sizes"][0] == found["sizes"][1] == found["sizes"][2] - 4000, found


@pytest.mark.slow
def test_peaks_of_all_layers(tmp_path):
    """GB of 7B steps. Another tracker found 47.8, 28.5, 19.1, 31.4 and 17.0 before normed values were made again and
    rotation freed its input, without the optimizer's 0.3; this one agreed within 1%. Since then SwiGLU's backward
    overwrites its input, and selective checkpointing saves no output of a block twice.
    """
    peaks = [size / 1e9 for size in results_of(tmp_path, PEAKS, "peaks")]
    assert peaks == pytest.approx([40.5, 25.8, 18.6, 16.7, 27.9, 16.9, 16.1], rel=0.01)
