"""Tasks of lm_eval while a model is trained: the same numbers as the command's, once each, whatever interrupts it."""

import json
import signal
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minorca import UserError, load_model, load_tokenizer
from minorca.config import EvalConfig
from minorca.evaluate import __main__ as evaluate_command
from minorca.train import __main__ as train_command
from minorca.train import loop, metrics, run, task_evaluation
from minorca.train.ranks import World
from minorca.train.task_evaluation import open_tasks
from tests.helpers import lines_of, torchrun
from tests.train.test_best import interrupt_at

lm_eval = pytest.importorskip("lm_eval")

from minorca.evaluate.harness import MinorcaLM
from minorca.evaluate.task_files import load_tasks

CHOICES = ["aa", "ab", "ba", "bb"]


@pytest.fixture
def tasks(tmp_path):
    """The options that evaluate two local tasks: one of choices, one that generates."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": f"Reverse {word}", "choices": CHOICES, "answer": n % 4} for n, word in enumerate(CHOICES * 3)]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{question}}:",
    }
    of_choices = {
        "task": "reverse",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    generating = {
        "task": "write",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match"}],
        "filter_list": [{"name": "first", "filter": [{"function": "take_first"}]}],
    }
    for config in (of_choices, generating):
        (folder / f"{config['task']}.yaml").write_text(json.dumps(shared | config))
    return {"eval.tasks": "[reverse, write]", "eval.include_path": folder, "eval.limit": 8}


NAMES = ["eval_reverse/acc", "eval_reverse/acc_norm", "eval_write/exact_match,first"]
EVERY = {"eval.every": 2, "train.steps": 6, "train.checkpoint_every": 3}


def evaluated(output) -> list[dict]:
    return [line for line in lines_of(output) if NAMES[0] in line]


def command_values(model, adapter, tasks, tmp_path) -> dict:
    """What `python -m minorca.evaluate` says of an adapter."""
    output = tmp_path / "results.json"
    options = ["--model", model, "--adapter", adapter, "--tasks", "reverse,write", "--limit", 8, "--dtype", "float32"]
    options += ["--include-path", tasks["eval.include_path"], "--no-cache", "--output", output]
    evaluate_command.main([str(option) for option in options])
    results = json.loads(output.read_text())["results"]
    found = {}
    for name in NAMES:
        task, _, metric = name.removeprefix("eval_").partition("/")
        found[name] = results[task][metric if "," in metric else f"{metric},none"]
    return found


def test_tasks_are_evaluated_on_the_live_model(tasks, workplace, tmp_path, monkeypatch, capsys):
    """Before the first step, every so many, and after the last, where the adapter's numbers are the command's; they
    change no bit of the run, and are in TensorBoard and the curves.
    """
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    train_command.main(workplace("without", **{"train.steps": 6, "train.checkpoint_every": 3, "lora.dropout": 0.1}))
    train_command.main(workplace(**EVERY, **tasks, **{"lora.dropout": 0.1}))
    lines = evaluated(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    assert all(list(line) == ["step", *NAMES] for line in lines)
    last = command_values(workplace.model_path, tmp_path / "run" / "adapter", tasks, tmp_path)
    assert {name: lines[-1][name] for name in NAMES} == last
    said = [line for line in lines_of(tmp_path / "run") if "loss" in line]
    assert [line["loss"] for line in said] == [line["loss"] for line in lines_of(tmp_path / "without")]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    axis = drawn[1].subfigs[1].axes[-1]
    for name, curve in zip(NAMES, axis.lines, strict=True):
        points = [(line["step"], line[name]) for line in lines]
        assert [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)] == points
        assert curve.get_label() == name.removeprefix("eval_") and list(zip(*curve.get_data())) == points
    printed = capsys.readouterr()
    assert f"step 6: reverse/acc {lines[-1][NAMES[0]]:.4f}, " in printed.out + printed.err


def test_a_group_has_its_own_metrics_and_shots_are_set(tasks, workplace, tmp_path):
    """Those of its tasks are left out. Evaluated again, everything is the same, the drawn examples included."""
    first = json.loads((tmp_path / "tasks" / "reverse.yaml").read_text())
    second = first | {"task": "again", "doc_to_text": "Again: {{question}}", "fewshot_split": "test"}
    group = {
        "group": "both",
        "task": ["reverse", "again"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": False}],
    }
    for name, config in (("again", second), ("both", group)):
        (tmp_path / "tasks" / f"{name}.yaml").write_text(json.dumps(config))
    model, tok = load_model(workplace.model_path, torch.float32), load_tokenizer(workplace.model_path)
    alone = cast(World, SimpleNamespace(sum=list, rank=0, size=1))

    def evaluate(names: list[str], **settings) -> dict[str, float]:
        evaluation = open_tasks(EvalConfig(names, include_path=str(tmp_path / "tasks"), **settings))
        assert evaluation
        values = evaluation(model, tok, alone)
        assert values and evaluation(model, tok, alone) == values and model.training
        return values

    apart = evaluate(["reverse", "again"])
    assert apart.keys() == {f"eval_{name}/{metric}" for name in ("reverse", "again") for metric in ("acc", "acc_norm")}
    together = evaluate(["both"])
    assert together == {"eval_both/acc": pytest.approx((apart["eval_reverse/acc"] + apart["eval_again/acc"]) / 2)}
    model.eval()
    lm = MinorcaLM(model, tok)
    tasks, manager = load_tasks(["again"], tmp_path / "tasks")
    theirs: Any = lm_eval.simple_evaluate(lm, tasks=tasks, task_manager=manager, num_fewshot=3, bootstrap_iters=0)
    shots = evaluate(["again"], num_fewshot=3)
    assert shots == {f"eval_again/{name}": theirs["results"]["again"][f"{name},none"] for name in ("acc", "acc_norm")}


# ---------------------------------------------------------------------------------------------------------- interrupted

SHORT = {"eval.tasks": "[task]", "eval.every": 2, "train.steps": 6, "train.checkpoint_every": 2}


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """The steps after which tasks were evaluated: in place of lm_eval's, one whose metric is the step."""
    made = []
    evaluate_tasks = loop.Run._evaluate_tasks

    def evaluate(run):
        def task(*_):
            made.append(run.step)
            return {NAMES[0]: run.step}

        run.tasks = task
        evaluate_tasks(run)

    monkeypatch.setattr(run, "open_tasks", lambda config: object())
    monkeypatch.setattr(loop.Run, "_evaluate_tasks", evaluate)
    # which takes most of such a run's time
    monkeypatch.setattr(metrics, "draw_curves", lambda *_: None)
    return made


def check_lines(output) -> None:
    assert [(line["step"], line[NAMES[0]]) for line in evaluated(output)] == [(step, step) for step in (0, 2, 4, 6)]


@pytest.mark.parametrize(
    "name, stop, checkpoint_every, before, after",
    [
        # its checkpoint is that of step 2, whose line it has
        ("step", 4, 2, [0, 2], [4, 6]),
        # the evaluation itself is lost
        ("tasks", 4, 2, [0, 2, 4], [4, 6]),
        pytest.param("step", 4, 3, [0, 2], [4, 6], marks=pytest.mark.slow),
        pytest.param("step", 3, 5, [0, 2], [0, 2, 4, 6], marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_repeats_no_evaluation(name, stop, checkpoint_every, before, after, made, workplace, tmp_path):
    options = workplace(**SHORT | {"train.checkpoint_every": checkpoint_every})
    interrupt_at(stop, options, name=name)
    assert made == before
    made.clear()
    train_command.main(options)
    assert made == after
    check_lines(tmp_path / "run")


@pytest.mark.parametrize("point", ["before", "within"])
def test_a_signal_before_or_within_an_evaluation_loses_none(point, made, workplace, tmp_path, monkeypatch):
    """The step is saved, and the run resumes with its tasks."""
    record, evaluate = metrics.Record.step, loop.Run._evaluate_tasks

    def signalled(self, step, *rest):
        record(self, step, *rest)
        # seen within step 4
        if point == "before" and step == 3:
            signal.raise_signal(signal.SIGINT)

    def interrupted(run):
        if point == "before" or run.step < 4:
            return evaluate(run)
        signal.raise_signal(signal.SIGINT)
        run._stop()

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(metrics.Record, "step", signalled)
        patch.setattr(loop.Run, "_evaluate_tasks", interrupted)
        train_command.main(workplace(**SHORT))
    assert made == [0, 2] and (tmp_path / "run" / "checkpoints" / "step-00000004").is_dir()
    train_command.main(workplace(**SHORT))
    assert made == [0, 2, 4, 6]
    check_lines(tmp_path / "run")


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_a_run_that_stops_early_evaluates_after_its_last_step(is_interrupted, made, workplace, tmp_path):
    options = workplace(**{"eval.tasks": "[task]", "train.steps": 6, "train.early_stopping": 1, "data.eval": 0.1})
    options += ["--train.eval_every=1", "--optim.lr=0.5"]
    if is_interrupted:
        evaluate = loop.Run._evaluate_tasks
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(loop.Run, "_evaluate_tasks", lambda run: evaluate(run) if run.step == 0 else 1 / 0)
            train_command.main(options)
    train_command.main(options)
    last = max(line["step"] for line in lines_of(tmp_path / "run"))
    assert made == [0, last] and 0 < last < 6
    assert [line["step"] for line in evaluated(tmp_path / "run")] == made


def test_a_finished_evaluation_is_not_repeated_where_the_adapter_is_missing(made, workplace, tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(loop, "publish", lambda *_: 1 / 0)
        train_command.main(workplace(**SHORT))
    train_command.main(workplace(**SHORT))
    assert made == [0, 2, 4, 6]
    check_lines(tmp_path / "run")


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_missing_lm_eval_is_an_error_before_anything_is_loaded(dry, workplace, tmp_path, monkeypatch):
    monkeypatch.setattr(task_evaluation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="eval.tasks needs lm_eval, which is not installed; pip install lm_eval==0.4"):
        train_command.main([*workplace(**{"eval.tasks": "[task]"}), *dry])
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_with_tasks_names_the_setting(tasks, workplace, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "build", None)
    with pytest.raises(UserError, match="eval.include_path is not a directory; expected one with the YAML files"):
        train_command.main(workplace(**tasks | {"eval.include_path": tmp_path / "none"}))
    (tmp_path / "tasks" / "rows.jsonl").unlink()
    with pytest.raises(UserError, match=r"reverse.yaml: dataset_kwargs.data_files names .*rows.jsonl, which does not"):
        train_command.main(workplace(**tasks))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_unknown_task(tasks, workplace, monkeypatch):
    """lm_eval's own are looked for, which takes half a minute."""
    monkeypatch.setattr(run, "build", None)
    with pytest.raises(UserError, match=r"eval.tasks .*revers is an unknown task; did you mean .*reverse"):
        train_command.main(workplace(**tasks | {"eval.tasks": "[revers]"}))


def test_a_dry_run_says_when(tasks, workplace, capsys):
    train_command.main([*workplace(**EVERY, **tasks), "--dry-run"])
    assert "tasks reverse, write: before step 1, and after step 2, 4, 6\n" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------- ranks


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"parallel.shard": "fsdp"}, {"train.full": "true", "lora.rank": 16}], ids=str)
def test_ranks_share_the_requests(settings, tasks, workplace, tmp_path):
    """Also those of a sharded model, whose forwards are collectives: as on one rank, and training goes on after."""
    common = EVERY | tasks | settings
    torchrun(1, workplace("one", **common))
    torchrun(2, workplace("two", **common))
    one, two = (evaluated(tmp_path / name) for name in ("one", "two"))
    assert [line["step"] for line in two] == [0, 2, 4, 6]
    assert one == two
    losses = [[line["loss"] for line in lines_of(tmp_path / name) if "loss" in line] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
