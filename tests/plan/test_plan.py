"""The plan of a run: its command, memory beside what is allocated, advice that holds, what collectives cost."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import SHAPES
from benchmarks.memory import CASES, NEAR, SMALL, Case, compare, peak_bytes
from minorca import cli
from minorca.config import Config, choices
from minorca.model.architecture import read_architecture
from minorca.plan import __main__ as plan_command
from minorca.plan import apart
from minorca.plan.advice import CHECKPOINTING, advise, changed, largest_micro_batch
from minorca.plan.communication import NODE, REACHED, Collective, communication_seconds
from minorca.plan.devices import GPUS, machine
from minorca.plan.estimate import KINDS, Estimate, Estimator, documents
from minorca.plan.fake_device import unavailable
from minorca.plan.fake_step import fake_step
from tests.helpers import ROOT

LENGTHS = ("data.seq_len", "train.micro_batch_tokens", "train.batch_tokens")
needs_compiler = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


@pytest.fixture
def options(tmp_path) -> list[str]:
    """A run of five layers, of which no weights exist, on rows that do not exist."""
    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["7b"] | shape | heads))
    settings = {
        "model.path": tmp_path,
        "model.dtype": "float32",
        "data.train": "rows.jsonl",
        "data.seq_len": 64,
        "lora.rank": 4,
        "train.batch_tokens": 128,
        "train.micro_batch_tokens": 128,
    }
    return [f"--{key}={value}" for key, value in settings.items()]


def planned(options: list[str], capsys) -> dict:
    plan_command.main([*options, "--json"])
    return json.loads(capsys.readouterr().out)


def test_command(options, capsys):
    """On the CPU: the keys, their sum, and the peak of a step of all layers, from steps of two and three."""
    plan = planned([*options, "--gpu", "cpu"], capsys)
    memory = plan["memory_bytes"]
    assert memory.keys() == {*KINDS, "total"} and sum(memory[kind] for kind in KINDS) == memory["total"]
    assert plan["fits"] is True and plan["advice"] == [] and plan["tokens_per_second"] is None
    assert plan["largest_micro_batch_tokens"] == 128
    _, config = cli.parse_config(cli.config_parser("test", ""), options)
    arch = read_architecture(config.model.path)
    step = fake_step(config, arch, machine("cpu", 1), 1, documents(config))
    assert memory["total"] == step.peak["total"]
    # four bytes a parameter
    assert memory["weights"] == 4 * sum(
        (2 * arch.vocab_size * 64, 64, arch.layers * (64 * 128 + 64 * 64 + 3 * 64 * 96 + 2 * 64))
    )
    assert memory["optimizer"] >= 2 * memory["adapters"] > 0

    plan_command.main([*options, "--gpu", "cpu"])
    table = capsys.readouterr().out
    assert f"{memory['total'] / 1e9:.2f} GB of" in table and ": fits" in table


def test_ranks_that_shard_need_less(options):
    _, config = cli.parse_config(cli.config_parser("test", ""), options)
    arch = dataclasses.replace(read_architecture(config.model.path), layers=2)
    estimator = Estimator(arch, machine("cpu", 2), 2)
    whole, sharded = (estimator(changed(config, {"parallel.shard": shard})) for shard in ("none", "fsdp"))
    assert sharded.sharded and not whole.sharded
    for kind in ("weights", "adapters"):
        assert sharded.memory[kind] == pytest.approx(whole.memory[kind] / 2, rel=0.01)


def test_a_model_is_sharded_by_the_weights_of_all_its_layers(options):
    """As a run does it, from half of a rank's memory on; three layers alone would be kept whole."""
    _, config = cli.parse_config(cli.config_parser("test", ""), options)
    arch = read_architecture(config.model.path)
    whole = Estimator(arch, machine("cpu", 2), 2)(changed(config, {"parallel.shard": "none"})).memory
    for share in (0.4, 0.6):
        device = dataclasses.replace(machine("cpu", 2), memory=int((whole["weights"] + whole["adapters"]) / share))
        found = Estimator(arch, device, 2)(config)
        assert found.sharded == (share > 0.5) == (found.memory["weights"] < whole["weights"])


@pytest.mark.parametrize(
    "wrong, words",
    [
        (["--gpu=H10"], ["--gpu is H10, which is not known", "did you mean H100"]),
        (["--gpu=T4"], ["compute capability 7.5; expected 8.0 or higher"]),
        (["--gpus=0"], ["--gpus is 0; expected at least 1"]),
        (["--lora.rank=0", "--optim.lr=-1"], ["lora.rank is 0; expected a positive", "optim.lr is -1"]),
        ([f"--{key}=1024" for key in LENGTHS], ["the model has 512 positions"]),
        (["--model.path=nowhere"], ["no such directory"]),
        (["--config=nowhere.yaml"], ["no such configuration file"]),
        (["--gpu=cpu", "--gpus=3", "--parallel.replicate=2"], ["expected a divisor of the number of ranks, 3"]),
        (["--model.quantize=nf4"], ["cannot be quantized to nf4: the rows of mlp.down_proj have 96 values"]),
    ],
)
def test_errors(wrong, words, options, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.run(plan_command.main, [*options, *wrong])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and all(word in error for word in words)
    assert all(line.startswith("minorca: error: ") for line in error.splitlines())


def test_all_weights_of_a_model_in_4_bits(options, tmp_path, capsys):
    path = tmp_path / "config.json"
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": stored}))
    with pytest.raises(SystemExit) as exit:
        cli.run(plan_command.main, [*options, "--gpu=cpu", "--train.full=true", "--lora.rank=16"])
    assert exit.value.code == 2 and "give the unquantized model, or train adapters" in capsys.readouterr().err


def test_without_a_compiler(options, monkeypatch, capsys):
    monkeypatch.setattr(apart, "unavailable", lambda: "a plan for a GPU needs a C++ compiler; install g++")
    with pytest.raises(SystemExit) as exit:
        cli.run(plan_command.main, [*options, "--gpu=H100"])
    assert exit.value.code == 2 and "install g++" in capsys.readouterr().err


def test_gpus_are_found_by_any_name():
    for gpu in GPUS:
        assert all(machine(name, 1) is gpu for name in (gpu.name, gpu.name.lower(), *gpu.torch_names))
    assert machine("rtx 4090", 1).name == machine("4090", 1).name == "RTX-4090"


class Linear(Estimator):
    """Made up: memory is 1,000 bytes, halved by quantizing and by two ranks that shard, and some for each token."""

    def __init__(self, memory: int, ranks: int = 1):
        super().__init__(SMALL, dataclasses.replace(machine("cpu", 1), memory=memory), ranks)

    def _estimate(self, config: Config) -> Estimate:
        kinds = choices(CHECKPOINTING)
        place = kinds.index(config.parallel.activation_checkpointing)
        weights = (
            1000
            // (1 + (config.model.quantize != "none"))
            // (1 + (self.ranks > 1 and config.parallel.shard == "fsdp"))
        )
        tokens = sum(documents(config))
        total = weights + tokens * (len(kinds) - place)
        micro_batches = config.train.batch_tokens // config.train.micro_batch_tokens
        return Estimate(
            {"weights": 0, "adapters": 0, "total": total}, tokens, micro_batches, tokens * (1.0 + place), 0.0, []
        )


@pytest.fixture
def config(options) -> Config:
    return cli.parse_config(cli.config_parser("test", ""), [*options, "--train.batch_tokens=1024"])[1]


@pytest.mark.parametrize("memory", range(1190, 4200, 97))
def test_the_largest_micro_batch_fits_and_the_next_does_not(memory, config):
    estimator = Linear(memory)
    fitting = [n for n in range(64, 1025) if 1024 % n == 0 and 1000 + n * len(choices(CHECKPOINTING)) <= memory]
    assert largest_micro_batch(estimator, config) == max(fitting, default=None)


@pytest.mark.parametrize("memory, ranks", [(1300, 1), (1150, 1), (1080, 2), (700, 2)])
def test_advice_fits_and_the_fastest_comes_first(memory, ranks, config, options):
    """Each piece is a setting of the command, keeps the rows, and gives what it says."""
    estimator = Linear(memory, ranks)
    advice = advise(estimator, config)
    assert advice and not estimator.fits(config)
    speeds = [piece.tokens_per_second or 0 for piece in advice]
    for piece in advice:
        other = changed(config, piece.settings)
        assert piece.memory == estimator(other).memory["total"] <= memory and other.data == config.data
        given = [*options, "--train.batch_tokens=1024", *piece.options.split()]
        assert cli.parse_config(cli.config_parser("test", ""), given)[1] == other
    assert speeds == sorted(speeds, reverse=True)


def test_shorter_rows_are_the_last_advice(config):
    config = changed(config, {"data.seq_len": 512, "train.micro_batch_tokens": 512})
    smallest = min(1000 // (1 + (kind != "none")) for kind in choices("model.quantize"))
    (piece,) = advise(Linear(smallest + 300), config)
    assert piece.settings["data.seq_len"] == 256 and Linear(smallest + 300).fits(changed(config, piece.settings))
    assert advise(Linear(10), config) == []


def test_what_fits_is_told_what_is_faster(config):
    config = changed(config, {CHECKPOINTING: "full"})
    (fastest, *_) = advise(Linear(10**6), config)
    assert fastest.settings == {CHECKPOINTING: "none"}


def test_what_collectives_cost():
    """Of a ring: (n - 1) / n of the bytes pass each GPU, twice in an all-reduce; more GPUs cost no less."""
    gpu = machine("H100", 1)
    gather = [Collective("all-gather", "forward", 1, 8 * 10**9)]
    summed = [Collective("all-reduce", "optimizer", 1, 8 * 10**9)]
    assert communication_seconds(gather, gpu, 1) == 0
    rate = REACHED * gpu.link
    assert communication_seconds(gather, gpu, NODE) == pytest.approx(7e9 / rate, rel=0.01)
    assert communication_seconds(summed, gpu, NODE) == pytest.approx(14e9 / rate, rel=0.01)
    for collectives in (gather, summed):
        seconds = [communication_seconds(collectives, gpu, 2**n) for n in range(12)]
        assert seconds == sorted(seconds)
    # shards within nodes, copies between them
    copies = [communication_seconds(gather, gpu, 64, replicate) for replicate in (1, 8)]
    assert copies[1] == communication_seconds(gather, gpu, NODE) < copies[0]


@pytest.mark.slow
def test_preferences_need_little_more_than_fine_tuning():
    """At equal tokens a tenth more at most: the reference's values, and no logits but those of a chunk of rows. What
    attention's backward works in may be less, as an answer is shorter than a document.
    """
    fine_tuning = Case("").config
    preferences = changed(fine_tuning, {"train.objective": "dpo", "data.format": "preference"})
    estimator = Estimator(SMALL, machine("cpu", 1), 1)
    less, more = (estimator(config).memory for config in (fine_tuning, preferences))
    assert less["activations"] < more["activations"] and more["total"] < 1.1 * less["total"]


@pytest.mark.slow
def test_a_plan_of_quantized_weights_on_the_cpu():
    """Projections that are stored as one matrix of several parts are read back on fake tensors."""
    whole = Case("").config
    quantized = changed(whole, {"model.quantize": "nf4"})
    nf4, fp32 = (Estimator(SMALL, machine("cpu", 1), 1)(config).memory["weights"] for config in (quantized, whole))
    # embedding and head are not quantized
    ends = 2 * SMALL.vocab_size * SMALL.hidden_size * 4
    assert 0.1 < (nf4 - ends) / (fp32 - ends) < 0.15


PREFERENCES = {
    "with values computed before": ["--dpo.precompute=true"],
    "another reference": ["--dpo.reference=adapters/other", "--lora.init=adapters/start"],
    "kto": ["--train.objective=kto"],
}


@pytest.mark.parametrize(
    "name", ["kto", *(pytest.param(name, marks=pytest.mark.slow) for name in PREFERENCES if " " in name)]
)
def test_plans_of_preferences(name, options):
    """No adapter is read; a reference needs a copy of what is trained, and values computed before none."""
    dpo = [*options, "--data.format=preference", "--train.objective=dpo"]
    configs = [cli.parse_config(cli.config_parser("test", ""), given)[1] for given in ([*dpo, *PREFERENCES[name]], dpo)]
    estimator = Estimator(read_architecture(configs[0].model.path), machine("cpu", 1), 1)
    plan, usual = (estimator(config).memory for config in configs)
    if "before" in name:
        assert plan["total"] <= usual["total"] - usual["adapters"] / 2
    else:
        assert plan["total"] >= 0.999 * usual["total"]


@pytest.mark.parametrize("case", CASES[:1] + CASES[-1:], ids=lambda case: case.name)
def test_memory_beside_what_is_allocated(case):
    assert abs(compare(case)["error"]) <= NEAR


@pytest.mark.slow
def test_memory_of_moments_in_8_bits():
    """Codes and scales are the optimizer's, a quarter of fp32's moments, and nothing is counted twice."""
    pytest.importorskip("torchao")
    fp32, small = (Case(name, {"lora.rank": 64, "optim.name": name}) for name in ("adamw", "adamw_8bit"))
    moments = [
        Estimator(case.architecture, machine("cpu", 1), 1)(case.config).memory["optimizer"] for case in (fp32, small)
    ]
    assert 0.25 < moments[1] / moments[0] < 0.3
    assert abs(compare(small)["error"]) <= NEAR


@needs_compiler
def test_an_optimizer_that_a_gpu_compiles(options):
    """torch compiles nothing on fake tensors."""
    pytest.importorskip("torchao")
    command = [sys.executable, "-m", "minorca.plan", *options, "--gpu=H100", "--optim.name=adamw_8bit", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 0, done.stderr[-1000:]
    assert any("adamw_8bit" in assumption for assumption in json.loads(done.stdout)["assumptions"])


def test_memory_of_an_earlier_case_does_not_count():
    """torch's profiler reports as freed what an earlier profile saw allocated."""
    tensors = []
    for _ in range(2):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            tensors.clear()
            tensors.append(torch.empty(1000))
            tensors.append(torch.empty(24))
        assert peak_bytes(profiler) == 4 * 1024


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[1:-1], ids=lambda case: case.name)
def test_memory_of_more_cases_beside_what_is_allocated(case):
    assert abs(compare(case)["error"]) <= NEAR


SCRIPT = """
import contextlib, io, json, sys
from minorca.plan.__main__ import main

def plan(*options):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main([*sys.argv[1:], *options, "--json"])
    return json.loads(out.getvalue())

small = plan("--gpu=4090")
kept = [plan("--gpu=4090", *advice["options"].split()) for advice in small["advice"][:1]]
print(json.dumps({"small": small, "kept": kept, "sharded": plan("--gpu=A100-40", "--gpus=8", "--parallel.shard=fsdp")}))
"""


@pytest.mark.slow
@needs_compiler
def test_7b_on_gpus(tmp_path):
    """A card that is too small gets advice that fits as it says; sharding communicates what is gathered."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["7b"]))
    (tmp_path / "script.py").write_text(SCRIPT)
    settings = {"model.path": tmp_path, "data.train": "rows", "train.micro_batch_tokens": 8192}
    command = [sys.executable, tmp_path / "script.py", *(f"--{key}={value}" for key, value in settings.items())]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment())
    found = json.loads(done.stdout)
    small, sharded = found["small"], found["sharded"]
    assert not small["fits"] and small["advice"]
    speeds = [advice["tokens_per_second"] for advice in small["advice"]]
    assert speeds == sorted(speeds, reverse=True)
    for advice, kept in zip(small["advice"], found["kept"]):
        assert kept["fits"] and kept["memory_bytes"]["total"] == advice["memory_bytes"]
        assert kept["tokens_per_second"] == pytest.approx(advice["tokens_per_second"])
    assert [row["gpus"] for row in sharded["communication"]] == [1, 8, 64, 1024]
    assert all(0 < row["efficiency"] <= 1.0001 for row in sharded["communication"])
    # every frozen weight twice, and the ends once
    assert sharded["communication"][1]["bytes"] == pytest.approx(2 * 14.5e9, rel=0.03)


CARDS = """
import contextlib, io, json, sys
from minorca.plan.__main__ import main

found = {}
for config, gpu in (("24gb", "4090"), ("12gb", "3060"), ("8gb", "4060")):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        options = [f"--config=configs/mistral-7b-openorca-{config}.yaml", f"--model.path={sys.argv[1]}"]
        main([*options, f"--gpu={gpu}", "--json"])
    plan = json.loads(out.getvalue())
    found[config] = {"fits": plan["fits"], "faster": [advice["settings"] for advice in plan["advice"]]}
print(json.dumps(found))
"""


@pytest.mark.slow
@needs_compiler
def test_the_configurations_of_small_cards(tmp_path):
    """Each fits its card, and nothing that computes less again does."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["7b"] | {"vocab_size": 32768}))
    (tmp_path / "script.py").write_text(CARDS)
    command = [sys.executable, tmp_path / "script.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment())
    for card, found in json.loads(done.stdout).items():
        kinds = {settings.get("parallel.activation_checkpointing") for settings in found["faster"]}
        assert found["fits"] and kinds <= {None}, card


def environment() -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "CUDA_VISIBLE_DEVICES": ""}
