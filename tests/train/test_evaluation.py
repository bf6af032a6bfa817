"""The loss of each evaluation set, and the sets' names."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minorca.cli import config_parser, parse_config
from minorca.train import __main__ as train_command
from minorca.train import step
from minorca.train.evaluation import set_names
from minorca.train.inputs import read_data, read_tokenizer
from minorca.train.objectives import NextToken
from tests.helpers import lines_of


@pytest.fixture
def sets(tmp_path):
    """sets(name=rows): the option that evaluates files of the last rows of rows.jsonl."""

    def write(**counts: int) -> str:
        rows = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
        for name, count in counts.items():
            (tmp_path / f"{name}.jsonl").write_text("".join(rows[:count]))
            del rows[:count]
        return "[" + ", ".join(f"{{path: {tmp_path / f'{name}.jsonl'}}}" for name in counts) + "]"

    return write


def test_each_set_has_its_loss_and_each_row_is_evaluated_once(sets, workplace, tmp_path, monkeypatch, capsys):
    """Compared with transformers' model, a row at a time; before step 1 the adapter does nothing."""
    options = workplace(**{"data.eval": sets(short=3, other=9), "train.steps": 1})
    evaluated = Counter()
    make_batch = step.make_batch

    def counted(store, rows):
        if len(store) == 12:
            evaluated.update(rows.tolist())
        return make_batch(store, rows)

    monkeypatch.setattr(step, "make_batch", counted)
    train_command.main(options)
    # before step 1 and after it
    assert evaluated == Counter(dict.fromkeys(range(12), 2))
    config = parse_config(config_parser("test", ""), options)[1]
    _, held_out = read_data(config, *read_tokenizer(config))
    assert held_out is not None
    sums, trained = [], []
    for row in range(12):
        ids, mask = (torch.from_numpy(np.array(part)) for part in held_out.row(row))
        logits = workplace.model(ids.long()[None]).logits[0]
        labels = ids.long()[1:].where(mask[1:], -100)
        sums.append(F.cross_entropy(logits[:-1], labels, reduction="sum").item())
        trained.append(int(mask.sum()))
    first = lines_of(tmp_path / "run")[0]
    names = [f"eval_{metric}{of_set}" for metric in ("loss", "perplexity") for of_set in ("", "/short", "/other")]
    assert set(first) == {"step", *names}
    for key, rows in (("", slice(12)), ("/short", slice(3)), ("/other", slice(3, 12))):
        mean = sum(sums[rows]) / sum(trained[rows])
        assert first[f"eval_loss{key}"] == pytest.approx(mean, rel=1e-5)
        assert first[f"eval_perplexity{key}"] == pytest.approx(np.e**mean, rel=1e-4)
    written = capsys.readouterr()
    message = f"held-out loss {first['eval_loss']:.4f} (short {first['eval_loss/short']:.4f}, other "
    assert message in written.out + written.err


def test_one_set_has_no_line_of_its_own(sets, workplace, tmp_path):
    for name, setting in (("file", tmp_path / "only.jsonl"), ("list", sets(only=6)), ("share", 0.1)):
        train_command.main(workplace(name, **{"data.eval": setting, "train.steps": 1}))
        assert {key for line in lines_of(tmp_path / name) for key in line if "eval" in key} == {
            "eval_loss",
            "eval_perplexity",
            "evaluation_seconds",
        }


def test_a_held_out_share_of_several_sources_is_evaluated_by_source(sets, workplace, tmp_path):
    train_command.main(workplace(**{"data.train": sets(easy=20, hard=40), "data.eval": 0.2, "train.steps": 1}))
    assert {key for key in lines_of(tmp_path / "run")[0] if "/" in key} == {
        f"eval_{metric}/{of_set}" for metric in ("loss", "perplexity") for of_set in ("easy", "hard")
    }


def test_perplexity_is_drawn_and_in_tensorboard(sets, workplace, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    train_command.main(workplace(**{"data.eval": sets(short=3, other=9), "train.steps": 2, "train.eval_every": 1}))
    *_, axis = drawn[0].subfigs[0].axes
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for name in ("perplexity", "perplexity/short", "perplexity/other"):
        points = [(line["step"], line[f"eval_{name}"]) for line in lines_of(tmp_path / "run") if "eval_loss" in line]
        assert len(points) == 3
        (line,) = [line for line in axis.lines if line.get_label() == name]
        assert list(zip(*line.get_data())) == points
        written = [(event.step, pytest.approx(event.value)) for event in events.Scalars(f"eval_{name}")]
        assert points == written


def test_a_loss_without_a_perplexity():
    assert NextToken().of_held_out(1e4) == {"perplexity": np.inf}


@pytest.mark.parametrize(
    "paths, names",
    [
        (["a.jsonl", "dir/b.parquet", "~/c.v2.csv", "d.jsonl.gz"], ["a", "b", "c.v2", "d"]),
        (["org/name", "org/data.v1", "org/name:split/test.parquet"], ["name", "data.v1", "test"]),
        (["a/test.jsonl", "b/test.jsonl"], ["a-test", "b-test"]),
        (["test.jsonl", "test.parquet"], ["test-1", "test-2"]),
        (["a/test.jsonl", "a/test.csv", "test"], ["a-test", "test-1", "test-2"]),
        (["held/*.jsonl", "/data/part-*.jsonl", "dir/"], ["held", "part-", "dir"]),
        (["*", "a-test", "a/test", "b/test"], ["rows", "a-test", "test-1", "b-test"]),
    ],
)
def test_sets_are_named_after_their_files(paths, names):
    assert set_names(paths) == names
