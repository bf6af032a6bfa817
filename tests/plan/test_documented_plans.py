"""The tables of the documentation that say what runs need are what a plan of them says, within 5%.

Such a table lies between `<!-- plan: OPTIONS -->` and `<!-- /plan -->`. The code in a row's first cell are further
options of `python -m minorca.plan`; the other cells are the gigabytes of a rank at the peak, with "does not fit" where
that is more than it has, and the tokens per second of all ranks.
"""

import functools
import json
import multiprocessing
import re
import shlex
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from benchmarks.common import SHAPES
from minorca import cli
from minorca.plan.devices import machine
from minorca.plan.estimate import Estimator, model_of
from minorca.plan.fake_device import unavailable
from tests.helpers import ROOT

V01 = {"vocab_size": 32000, "rope_theta": 1e4, "sliding_window": 4096}
# what differs from Mistral 7B v0.3
MODELS = {"Mistral-7B-v0.3": {}, "Mistral-7B-v0.1": V01, "OpenHermes-2.5-Mistral-7B": V01 | {"vocab_size": 32002}}
# a few seconds each, and as many as the slow tests have time for
MOST_ROWS = 30


def documented() -> list[tuple[str, str, str]]:
    """The options of each row, its memory and its speed."""
    rows = []
    for document in sorted((ROOT / "docs").rglob("*.md")):
        for options, table in re.findall(r"<!-- plan: (.*?) -->\n(.*?)<!-- /plan -->", document.read_text(), re.S):
            for row in table.splitlines()[2:]:
                first, memory, speed = row.strip("|").split(" | ")[:3]
                rows.append((f"{options} {' '.join(re.findall('`(.*?)`', first))}", memory, speed))
    return rows


@functools.cache
def estimator(arch, gpu: str, ranks: int) -> Estimator:
    return Estimator(arch, machine(gpu, ranks), ranks)


def estimate(options: str, models: Path) -> tuple[float, bool, float]:
    parser = cli.config_parser("test", "")
    parser.add_argument("--gpu")
    parser.add_argument("--gpus", type=int, default=1)
    args, config = cli.parse_config(parser, shlex.split(options))
    config.model.path = str(models / Path(config.model.path).name)
    config, arch = model_of(config)
    found = estimator(arch, args.gpu, args.gpus)
    return found(config).memory["total"] / 1e9, found.fits(config), found.tokens_per_second(config) or 0.0


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """plan(options) -> gigabytes, whether they fit, and tokens per second of a run of Mistral 7B."""
    models = tmp_path_factory.mktemp("models")
    for name, differences in MODELS.items():
        (models / name).mkdir()
        (models / name / "config.json").write_text(json.dumps(SHAPES["7b"] | differences))
    # where no test has run a backward before, after which torch knows no other device
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        yield lambda options: process.submit(estimate, options, models).result()


def test_there_are_tables_of_plans():
    assert 10 < len(documented()) <= MOST_ROWS


@pytest.mark.slow
@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
@pytest.mark.parametrize("options, memory, speed", documented(), ids=[row[0] for row in documented()])
def test_what_is_documented_is_planned(options, memory, speed, plan, monkeypatch):
    monkeypatch.chdir(ROOT)
    gigabytes, fits, tokens_per_second = plan(options)
    assert float(memory.split()[0]) == pytest.approx(gigabytes, rel=0.05), f"{gigabytes:.1f}"
    assert ("does not fit" not in memory) == fits
    if fits:
        assert float(speed.replace(",", "")) == pytest.approx(tokens_per_second, rel=0.05), f"{tokens_per_second:,.0f}"
