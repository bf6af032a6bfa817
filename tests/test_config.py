"""Settings from a file and the command line: all errors are reported at once, and valid settings are kept."""

import dataclasses
import re

import pytest
import yaml

from minorca import UserError
from minorca.cli import config_parser, parse_config
from minorca.config import Config, defaults
from minorca.config_file import _ELSEWHERE, config_text, settings
from tests.helpers import ROOT

# every setting with its documented default; the two paths have none
SETTINGS = """
model:    {path: DIR, dtype: bfloat16, quantize: none, double_quant: true}
lora:     {rank: 16, alpha: 32, dropout: 0.0, targets: [q, k, v, o, gate, up, down], modules_to_save: [],
           rslora: false, init: null}
data:     {train: PATH, eval: null, limit: null, format: openorca, template: auto, seq_len: 4096, packing: true,
           store: null, train_on: response, too_long: drop, empty_response: drop, bad_rows: error,
           pairs: extremes, columns: {}, roles: {}, parse_control_tokens: true}
optim:    {name: adamw, lr: 2.0e-4, betas: [0.9, 0.95], eps: 1.0e-8, weight_decay: 0.0, warmup_steps: 0,
           warmup_ratio: null, schedule: cosine, min_lr: 0.0, max_grad_norm: 1.0}
train:    {objective: sft, full: false, new_tokens: [], steps: null, epochs: 1, batch_tokens: 32768,
           micro_batch_tokens: 4096, seed: 0,
           output: runs/run, checkpoint_every: 100, keep: 2, keep_best: false, eval_every: 0, early_stopping: null,
           log_every: 1, resume: auto, nonfinite: stop, deterministic: false, wandb: null}
eval:     {tasks: [], every: 0, limit: null, include_path: null, num_fewshot: null}
dpo:      {beta: 0.1, loss: sigmoid, label_smoothing: 0.0, sft_weight: 0.0, gamma: 0.5, desirable_weight: 1.0,
           undesirable_weight: 1.0, reference: auto, precompute: false}
parallel: {shard: auto, replicate: 1, activation_checkpointing: none, cpu_offload: false, timeout: 300}
"""
MINIMAL = "model: {path: DIR}\ndata: {train: PATH}\n"
LEAVES = [(section, key, value) for section, keys in yaml.safe_load(SETTINGS).items() for key, value in keys.items()]


@pytest.fixture
def read(tmp_path):
    """read(text, *options): the Config of a run.yaml with this text, and of options."""

    def read(text: str, *options: str) -> Config:
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        parser = config_parser("minorca.train", "")
        return parse_config(parser, ["--config", str(tmp_path / "run.yaml"), *options])[1]

    return read


def plain(config: Config) -> dict:
    values = dataclasses.asdict(config)
    values["optim"]["betas"] = list(values["optim"]["betas"])
    return values


def complaints(read, text: str, *options: str) -> list[str]:
    """The error messages for a file and options; each names the file or the option."""
    with pytest.raises(UserError) as caught:
        read(text, *options)
    problems = caught.value.problems
    for problem in problems:
        of_option = problem.path is None
        assert of_option == (problem.field is None or problem.field.startswith("--")), problem
        assert of_option or str(problem).startswith(f"{problem.path}: ")
    return [problem.sentence for problem in problems]


def test_the_documented_settings_are_all_there_are_with_their_defaults(read):
    assert plain(read(SETTINGS)) == yaml.safe_load(SETTINGS)
    assert read(MINIMAL) == read(SETTINGS)


@pytest.mark.parametrize("section, key, value", LEAVES, ids=lambda part: str(part))
def test_every_setting_is_also_an_option(section, key, value, read):
    """The option sets the key, which the file lacks, to the same value."""
    values = yaml.safe_load(SETTINGS)
    del values[section][key]
    given = "DIR2" if key in ("path", "train", "output") else value
    text = yaml.safe_dump(given, default_flow_style=True).split("\n")[0]
    config = read(yaml.safe_dump(values), f"--{section}.{key}", text)
    assert plain(config)[section] == yaml.safe_load(SETTINGS)[section] | {key: given}


def test_everything_wrong_is_reported_at_once(read):
    """Unknown keys, sections and options, types, ranges and contradictions: each is reported once, and nothing else."""
    text = """
model: {path: DIR, dtype: float16, colour: red}
lora: {rank: 0, dropout: 1.0, targets: [q, x], rslora: 3}
data: {train: PATH, eval: 1.5, seq_len: long, packing: maybe, limit: -1}
optim: {lr: fast, betas: [0.9, 1.0], weight_decay: -0.1, max_grad_norm: .nan}
train: {batch_tokens: 5000, micro_batch_tokens: 4000, eval_every: -1, steps: 2.5, epochs: true, seed: null}
parallel: {shard: none, replicate: 2, cpu_offload: true}
extra: {key: 1}
"""
    found = complaints(read, text, "--lora.rang=8", "--optim.eps", "0", "stray")
    starts = [
        "--lora.rang is an unknown option; did you mean lora.rank?",
        "unexpected argument stray",
        "model.colour is an unknown setting",
        "extra is an unknown setting",
        "model.dtype is 'float16'",
        "lora.targets is 'x'",
        "lora.rslora is 3",
        "lora.rank is 0",
        "lora.dropout is 1.0",
        "data.seq_len is 'long'",
        "data.packing is 'maybe'",
        "data.eval is 1.5",
        "data.limit is -1",
        "optim.lr is 'fast'",
        "optim.betas is [0.9, 1.0]",
        "optim.weight_decay is -0.1",
        "optim.max_grad_norm is nan",
        "--optim.eps is 0",
        "train.batch_tokens is 5000",
        "train.eval_every is -1",
        "train.steps is 2.5",
        "train.epochs is True",
        "train.seed is None",
        "parallel.replicate is over 1",
        "parallel.cpu_offload needs",
    ]
    for start in starts:
        assert sum(complaint.startswith(start) for complaint in found) == 1, (start, found)
    assert len(found) == len(starts), found


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", ["model.path is missing", "data.train is missing"]),
        ("model: {}\ndata: {}", ["model.path is missing", "data.train is missing"]),
        ("model: {path: null}\ndata: {train: [1]}", ["model.path is None", "data.train[0] is 1"]),
        ("model: {path: 7}\ndata: {train: PATH}", ["model.path is 7"]),
        (
            "model: {path: DIR}\ndata: {train: [{path: a, weight: x, colour: 1}, {}]}",
            [
                "data.train[0].weight is 'x'",
                "data.train[0].colour is an unknown setting",
                "data.train[1].path is missing",
            ],
        ),
        ("model: {path: DIR}\ndata: {train: [{path: a, weight: 0}]}", ["data.train gives a the weight 0.0"]),
        (
            "model: {path: DIR}\ndata: {train: [{path: a, weight: 1.0e+9}]}",
            ["data.train gives a the weight 1000000000.0"],
        ),
        (
            "model: {path: DIR}\ndata: {train: PATH, eval: [{path: a, weight: 0.5}]}",
            ["data.eval gives a the weight 0.5; held-out rows"],
        ),
        (MINIMAL + "parallel: {timeout: 1}", ["parallel.timeout is 1; expected 10"]),
        (MINIMAL + "train: {output: ' '}", ["train.output is empty"]),
        ("model: {path: DIR}\ndata: {train: PATH, format: text}", ["data.train reads PATH as plain text"]),
        (
            "model: {path: DIR}\ndata: {train: PATH, too_long: split}",
            ["data.too_long is split, but data.train reads PATH as openorca, and only text can be split"],
        ),
        (
            MINIMAL + "train: {objective: dpo}",
            [
                "train.objective is dpo, but data.train reads PATH as openorca; set data.format to preference, or the "
                "objective to sft"
            ],
        ),
        (
            "model: {path: DIR}\ndata: {train: PATH, format: preference}",
            [
                "train.objective is sft, but data.train reads PATH as preference; set it to one of dpo, orpo, simpo, "
                "cpo, kto, or read another format"
            ],
        ),
        (
            "model: {path: DIR}\ntrain: {objective: kto}\n"
            "data: {train: [{path: A, format: preference}, B], eval: [{path: C, format: text}]}",
            [
                "data.eval reads C as plain text, which has no responses; set data.train_on to all",
                "train.objective is kto, but data.train reads B as openorca",
                "train.objective is kto, but data.eval reads C as text",
            ],
        ),
        (
            "model: {path: DIR}\ntrain: {objective: dpo}\n"
            "data: {train: PATH, format: preference, train_on: all, too_long: truncate}",
            [
                "data.train_on is all, but data.train",
                "data.too_long is truncate, but data.train reads PATH as preference",
            ],
        ),
        (
            "model: {path: DIR}\ntrain: {objective: dpo}\ndata: {train: PATH, format: preference, too_long: split}",
            ["data.too_long is split, but data.train reads PATH as preference"],
        ),
        (
            "model: {path: DIR}\ndata: {train: PATH, pairs: all}",
            ["data.pairs is all, which needs data.format preference"],
        ),
        (
            "model: {path: DIR}\ntrain: {objective: kto}\ndata: {train: PATH, format: preference, pairs: all}",
            ["data.pairs is all, but train.objective kto compares no answers; set it to extremes"],
        ),
        (
            "model: {path: DIR}\ndata: {train: PATH, format: text, train_on: all, too_long: split, seq_len: 1}",
            ["data.seq_len is 1; a piece of a text needs two tokens"],
        ),
        (
            "model: {path: DIR}\ndata: {train: PATH, columns: {query: q}, roles: {bot: robot}}",
            [
                "data.columns has query for PATH; format openorca has the columns system_prompt, question,",
                "data.roles maps bot to robot for PATH; expected one of system, user, assistant, tool",
            ],
        ),
        ("model: {path: DIR}\ndata: {train: PATH, columns: {question: 1}}", ["data.columns is 1"]),
        ("model: {path: DIR}\ndata: {train: [a, [b]]}", ["data.train[1] is ['b']"]),
        (MINIMAL + "1: {a: b}", ["1 is an unknown setting"]),
        (MINIMAL + "lora: {2024-01-01: 1}", ["lora.2024-01-01 is an unknown setting"]),
        (MINIMAL + "lora: {rank: '16'}", ["lora.rank is '16'"]),
        (MINIMAL + "lora: {targets: embed}", ["lora.targets is 'embed'; expected a list, as in [\"embed\"]"]),
        (MINIMAL + "lora: {rank: true}", ["lora.rank is True"]),
        (MINIMAL + "lora: {rank: 16.5}", ["lora.rank is 16.5"]),
        (MINIMAL + "lora: {targets: []}", ["lora.targets is []"]),
        (MINIMAL + "lora: {targets: [q, q]}", ["lora.targets is ['q', 'q']"]),
        (MINIMAL + "optim: {betas: [0.9]}", ["optim.betas is"]),
        (MINIMAL + "train: {eval_every: 5}", ["train.eval_every is set but data.eval is not"]),
        (
            MINIMAL + "eval: {every: 5, limit: 0, num_fewshot: -1}",
            [
                "eval.limit is 0; expected a positive number",
                "eval.num_fewshot is -1; expected 0 or more",
                "eval.every is 5, which needs eval.tasks; name the tasks",
                "eval.limit is 0, which needs eval.tasks",
                "eval.num_fewshot is -1, which needs eval.tasks",
            ],
        ),
        (
            MINIMAL + "eval: {tasks: [a, a], every: often}\nparallel: {cpu_offload: true}",
            [
                "eval.every is 'often'; expected a number of steps",
                "eval.tasks is ['a', 'a']; expected each once",
                "eval.tasks needs the model on its device, and parallel.cpu_offload",
            ],
        ),
        (MINIMAL + "train: {eval_every: 1 epoch}", ["train.eval_every is set but data.eval is not"]),
        (MINIMAL + "train: {checkpoint_every: 0.5}", ["train.checkpoint_every is 0.5; expected a number of steps, at"]),
        (MINIMAL + "train: {checkpoint_every: true}", ["train.checkpoint_every is True; expected a number of steps"]),
        (MINIMAL + "train: {checkpoint_every: 3 steps}", ["train.checkpoint_every is '3 steps'; expected a number"]),
        (MINIMAL + "train: {checkpoint_every: '100'}", ["train.checkpoint_every is '100'; expected a number of steps"]),
        (MINIMAL + "train: {checkpoint_every: 0 epochs}", ["train.checkpoint_every is '0 epochs'; expected a number"]),
        (MINIMAL + "train: {epochs: 0.0}", ["train.epochs is 0.0; expected a positive number"]),
        (MINIMAL + "train: {epochs: '2'}", ["train.epochs is '2'"]),
        (MINIMAL + "train: {keep_best: true}", ["train.keep_best needs evaluations: set data.eval, and"]),
        (MINIMAL + "train: {early_stopping: 3}", ["train.early_stopping needs evaluations: set data.eval, and"]),
        (
            "model: {path: DIR}\ndata: {train: PATH, eval: 0.1}\ntrain: {keep_best: true, early_stopping: 0}",
            [
                "train.early_stopping is 0; expected a positive number",
                "train.keep_best needs evaluations",
                "train.early_stopping needs evaluations",
            ],
        ),
        (MINIMAL + "optim: {warmup_ratio: 1.0}", ["optim.warmup_ratio is 1.0; expected at least 0 and less than 1"]),
        (MINIMAL + "optim: {warmup_ratio: -0.1}", ["optim.warmup_ratio is -0.1; expected at least 0 and less than 1"]),
        (
            MINIMAL + "optim: {warmup_ratio: 0.1, warmup_steps: 5}",
            ["optim.warmup_ratio is 0.1 and optim.warmup_steps 5; set one of them"],
        ),
        (
            MINIMAL + "optim: {warmup_steps: 100}\ntrain: {steps: 99}",
            ["optim.warmup_steps is 100, longer than the run of 99 steps; lower it, or train longer"],
        ),
        (MINIMAL + "optim: {min_lr: 1.0e-3}", ["optim.min_lr is 0.001; expected at most optim.lr, 0.0002"]),
        (MINIMAL + "optim: {min_lr: -1.0}", ["optim.min_lr is -1.0; expected 0 or more"]),
        (
            MINIMAL + "optim: {min_lr: 1.0e-5, schedule: constant}",
            ["optim.min_lr is 1e-05, and optim.schedule constant never falls"],
        ),
        (
            "model: {path: DIR, double_quant: false}\ndata: {train: PATH}",
            ["model.double_quant is false, which needs model.quantize nf4"],
        ),
        (MINIMAL + "train: {micro_batch_tokens: 2048}", ["train.micro_batch_tokens is 2048 and data.seq_len 4096"]),
    ],
)
def test_complaints(text, expected, read):
    found = complaints(read, text)
    assert len(found) == len(expected) and all(map(str.startswith, found, expected)), found


def test_what_was_complained_of_is_no_part_of_a_contradiction(read):
    """An invalid seq_len is not replaced by its default, which would exceed this micro-batch."""
    text = "model: {path: DIR}\ndata: {train: PATH, seq_len: long}\ntrain: {micro_batch_tokens: 1024}"
    assert not [complaint for complaint in complaints(read, text) if "micro_batch_tokens" in complaint]


@pytest.mark.parametrize(
    "addition, key",
    [
        ("model: {path: DIR, quantize: fp8}\ndata: {train: PATH}", "model.quantize is 'fp8'"),
        ("model: {path: DIR}\ndata: {train: PATH, format: ranking}", "data.format is 'ranking'"),
        (MINIMAL + "train: {objective: ppo}", "train.objective is 'ppo'"),
    ],
)
def test_what_does_not_exist_yet_is_refused(addition, key, read):
    assert complaints(read, addition)[0].startswith(key)


@pytest.mark.parametrize(
    "text, line, complaint",
    [
        ("model: {path: A}\ndata: {train: B}\nmodel: {path: C}\n", 3, "model is given twice"),
        ("model:\n  path: A\n  dtype: float32\n  path: B\n", 4, "path is given twice"),
        ("model: {path: A\ndata: {train: B}\n", 2, ""),
        ("model:\n\tpath: A\n", 2, ""),
        ("model: {path: !!python/object/apply:os.system [true]}\n", 1, "could not determine a constructor"),
    ],
)
def test_a_broken_file_is_named_with_the_line(text, line, complaint, read, tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}/run.yaml, line {line}: .*{complaint}"):
        read(text)


@pytest.mark.parametrize("text", ["- model\n- data\n", "just text", "7"])
def test_a_file_without_sections(text, read, tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}/run.yaml: expected sections"):
        read(text)


def test_a_missing_file(tmp_path):
    parser = config_parser("minorca.train", "")
    with pytest.raises(UserError, match="nowhere.yaml: no such configuration file"):
        parse_config(parser, ["--config", str(tmp_path / "nowhere.yaml")])


OVERRIDES = [
    (["--lora.targets", "[q, v]"], "lora", "targets", ["q", "v"]),
    (["--lora.targets=[down]"], "lora", "targets", ["down"]),
    (["--optim.betas", "[0.8, 0.9]"], "optim", "betas", (0.8, 0.9)),
    (["--data.limit", "null"], "data", "limit", None),
    (["--data.eval", "null"], "data", "eval", None),
    (["--data.eval", "0.25"], "data", "eval", 0.25),
    (["--data.eval", "5e-2"], "data", "eval", 0.05),
    (["--data.eval", "held out.jsonl"], "data", "eval", "held out.jsonl"),
    (["--lora.init", "null"], "lora", "init", None),
    (["--optim.lr", "1e-3"], "optim", "lr", 1e-3),
    (["--data.packing", "false"], "data", "packing", False),
    (["--train.epochs", "2.5"], "train", "epochs", 2.5),
    (["--train.epochs", "3"], "train", "epochs", 3),
    (["--train.checkpoint_every", "0.5 epochs"], "train", "checkpoint_every", "0.5 epochs"),
    (["--train.eval_every=1 epoch"], "train", "eval_every", "1 epoch"),
    (["--train.keep_best", "false"], "train", "keep_best", False),
    (["--optim.warmup_ratio", "0.03"], "optim", "warmup_ratio", 0.03),
    (["--train.steps", "3", "--train.steps", "4"], "train", "steps", 4),
    (["--train.output", "null"], "train", "output", "runs/run"),
    (["--train.output", "007"], "train", "output", "007"),
    (["--train.output", "2024_01"], "train", "output", "2024_01"),
    (["--train.resume", "never"], "train", "resume", "never"),
    (["--model.path", "[odd"], "model", "path", "[odd"),
    (["--model.path", "@odd: name"], "model", "path", "@odd: name"),
    (["--data.train", "Open-Orca/OpenOrca:1M.parquet"], "data", "train", "Open-Orca/OpenOrca:1M.parquet"),
]


@pytest.mark.parametrize("options, section, key, expected", OVERRIDES, ids=lambda part: str(part))
def test_options_override_the_file(options, section, key, expected, read):
    text = "model: {path: DIR}\nlora: {init: DIR2}\ndata: {train: PATH, limit: 5, eval: PATH2}\ntrain: {output: other}"
    config = read(text, *options)
    assert getattr(getattr(config, section), key) == expected
    untouched = dataclasses.replace(getattr(config, section), **{key: getattr(getattr(read(text), section), key)})
    assert dataclasses.replace(config, **{section: untouched}) == read(text)


@pytest.mark.parametrize("option, value", [("--lora.targets", "[q"), ("--lora.rank", "{"), ("--data.limit", "@")])
def test_an_option_that_is_no_yaml_is_a_wrong_type(option, value, read):
    (complaint, *_) = complaints(read, MINIMAL, option, value)
    assert complaint.startswith(f"{option} is {value!r}")


def test_numbers_with_an_exponent_are_numbers(read):
    """In YAML 1.1, which PyYAML implements, 2e-4 without a point is a string."""
    optim = read(MINIMAL + "optim: {lr: 2e-4, eps: 1E-8, weight_decay: 1e+1, max_grad_norm: .5e1}").optim
    assert (optim.lr, optim.eps, optim.weight_decay, optim.max_grad_norm) == (2e-4, 1e-8, 10.0, 5.0)


@pytest.mark.parametrize(
    "text",
    [
        SETTINGS,
        "model: {path: 'a: #b é 日本'}\nlora: {targets: [up], alpha: 0.1}\ndata: {train: PATH, eval: 0.1}\n"
        "optim: {lr: 1.2345678901234567e-05, warmup_ratio: 0.1}\ntrain: {epochs: 2.5, eval_every: 0.5 epochs}\n"
        "parallel: {shard: fsdp, cpu_offload: true}",
    ],
)
def test_what_is_written_reads_back_equal(text, read, tmp_path):
    config = read(text)
    file = tmp_path / "written.yaml"
    file.write_text(config_text(config))
    assert parse_config(config_parser("minorca.train", ""), ["--config", str(file)])[1] == config


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_what_is_shipped_is_valid(file):
    _, config = parse_config(config_parser("minorca.train", ""), ["--config", str(file)])
    if file.stem == "quickstart":
        assert (ROOT / str(config.data.train)).is_file()


def test_without_a_file_all_settings_have_the_defaults_of_the_help():
    parser = config_parser("minorca.train", "")
    _, config = parse_config(parser, ["--model.path", "M", "--data.train", "F"])
    assert {key: value for key, value in flat(config).items() if key in defaults()} == defaults() | {
        "train.output": "runs/default"
    }
    help = re.sub(r"\s+", "", parser.format_help())
    for key, value in defaults().items():
        option = help.index(f"--{key}")
        assert f"(default:{value})".replace(" ", "") in help[option : option + 1000] or key == "optim.betas", key
    with pytest.raises(UserError) as caught:
        parse_config(parser, [])
    assert [problem.sentence for problem in caught.value.problems] == ["model.path is missing", "data.train is missing"]


def flat(config: Config) -> dict:
    return {f"{section}.{key}": value for section, keys in plain(config).items() for key, value in keys.items()}


@pytest.mark.parametrize(
    "addition, expected",
    [
        ("lora: {rang: 8}", "lora.rang is an unknown setting; did you mean lora.rank?"),
        ("train: {lr: 1}", "train.lr is an unknown setting; here it is optim.lr"),
        ("train: {learning_rate: 1}", "train.learning_rate is an unknown setting; here it is optim.lr"),
        ("optimizer: {lr: 1}", "optimizer is an unknown setting; did you mean optim?"),
        ("zzz: {key: 1}", "zzz is an unknown setting"),
        ("lora_r: 8", "lora_r is outside of a section; expected .*; here it is lora.rank"),
        ("sequence_len: 8", "sequence_len is outside of a section; .*; here it is data.seq_len"),
        ("per_device_train_batch_size: 8", "per_device_train_batch_size is .*; here it is train.micro_batch_tokens"),
        ("num_train_epochs: 8", "num_train_epochs is outside of a section; .*; here it is train.epochs"),
        ("lr_min: 8", "lr_min is outside of a section; .*; here it is optim.min_lr"),
        ("warmup_ratio: 0.1", "warmup_ratio is outside of a section; .*; here it is optim.warmup_ratio"),
        ("early_stopping_patience: 3", "early_stopping_patience is outside .*; here it is train.early_stopping"),
        ("load_best_model_at_end: true", "load_best_model_at_end is outside of .*; here it is train.keep_best"),
        ("evals_per_epoch: 2", "evals_per_epoch is outside of a section; .*; here it is train.eval_every"),
        ("seq_len: 8", "seq_len is outside of a section; .*; here it is data.seq_len"),
        ("batch_tokns: 8", "batch_tokns is outside of a section; .*; did you mean train.batch_tokens?"),
        ("train: 5", "train is 5; expected a section with keys"),
        (
            "strange: 8",
            "strange is outside of a section; expected model, data, lora, optim, train, eval, dpo, parallel",
        ),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(addition, expected, read):
    (found,) = complaints(read, MINIMAL + addition)
    assert re.match(expected.replace("?", r"\?"), found), found


def test_a_flat_file_of_another_tool_is_told_where_each_key_lives(read):
    found = complaints(read, "base_model: M\nlearning_rate: 2e-4\nlora_alpha: 3\ndatasets: [x]\n")
    assert [complaint.rpartition(" ")[2] for complaint in found] == [
        "model.path",
        "optim.lr",
        "lora.alpha",
        "data.train",
        "missing",
        "missing",
    ]


def test_the_places_that_other_tools_keys_have_here_exist():
    assert set(_ELSEWHERE.values()) <= set(settings())


def test_a_range_is_reported_beside_an_unknown_section(read):
    """Also if the section's name is a part of the other message."""
    for name in ("e", "is", "lr", "expected"):
        found = complaints(read, MINIMAL + f"optim: {{lr: -1.0}}\n{name}: {{}}")
        assert len(found) == 2 and found[1] == "optim.lr is -1.0; expected a positive number"


@pytest.mark.parametrize("name", ["1e5", "a: b", "[x]", "null", "ünïcode", "two words", "007"])
def test_a_run_of_any_name_can_be_read_back(name, read):
    config = read(MINIMAL, "--train.output", name) if name != "null" else read(MINIMAL)
    assert read(config_text(config)) == config


@pytest.mark.parametrize("text", ["[{path: a}", "{path: a}", "[{path: a, weight: 2]"])
def test_a_list_that_is_none_is_no_hub_id(text, read):
    with pytest.raises(UserError, match="expected a path, a hub id or a list"):
        read(MINIMAL, "--data.train", text)


def test_options_that_are_no_text(read):
    with pytest.raises(UserError, match="--train.output .* is not valid UTF-8"):
        read(MINIMAL, "--train.output", "a\udcffb")


def test_sources_are_also_an_option(read):
    config = read(MINIMAL, "--data.train", "[{path: a, weight: 2}, {path: b, format: alpaca}]")
    assert [(source.path, source.format, source.weight) for source in config.data.sources(config.data.train)] == [
        ("a", "openorca", 2),
        ("b", "alpaca", 1),
    ]
    mixed = read(MINIMAL, "--data.train", "[a.jsonl, {path: b, split: test, name: en}, 'c/*.csv']").data
    assert [(source.path, source.split, source.name) for source in mixed.sources(mixed.train)] == [
        ("a.jsonl", None, None),
        ("b", "test", "en"),
        ("c/*.csv", None, None),
    ]


def test_columns_and_roles_of_a_source_replace_those_of_all(read):
    text = (
        "model: {path: DIR}\ndata: {train: [a, {path: b, columns: {}, roles: {bot: assistant}}], format: alpaca, "
        "columns: {output: answer}, roles: {narrator: system}}"
    )
    data = read(text).data
    assert [(source.columns, source.roles) for source in data.sources(data.train)] == [
        ({"output": "answer"}, {"narrator": "system"}),
        ({}, {"bot": "assistant"}),
    ]


@pytest.mark.parametrize("key", ["train", "eval"])
def test_one_source_with_keys_is_told_to_be_a_list(key, read):
    with pytest.raises(UserError) as caught:
        read(
            f"model: {{path: DIR}}\ndata: {{{'train: x, ' if key == 'eval' else ''}{key}: {{path: x, format: alpaca}}}}"
        )
    expected = "is one source with keys; expected a path, or a list, as in [{path: FILE, format: NAME}]"
    assert str(caught.value).endswith(f"data.{key} {expected}")
