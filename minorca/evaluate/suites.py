"""Suites: the tasks behind the scores that model cards quote, with the cards' own shots, metrics and averages.

leaderboard-v1  the first Hugging Face leaderboard (lm_eval at b281b092, June 2023). The OpenOrca card averages four of
                its six tasks. MMLU is the unweighted mean of its 57 subjects, as there; lm_eval's group weights by
                size.
agieval         the eight English tasks of AGIEval that Nous chose, zero-shot: unweighted mean of acc_norm. lm_eval's
                group `agieval_nous` weights by size.
bigbench-hard   the 18 tasks of bigbench.py, zero-shot
gpt4all         seven tasks, zero-shot: mean of acc_norm where lm_eval defines it, else of acc
mt-bench        mt_bench.py
seed            all five: what the card of Mistral-7B-OpenOrca quotes

A mean's standard error takes its tasks as independent: sqrt(sum of squared standard errors) / number of tasks.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minorca.errors import UserError, raise_problems
from minorca.evaluate import bigbench
from minorca.evaluate.published import AGIEVAL_MEAN, BIGBENCH_MEAN, FOUR, GPT4ALL_MEAN, SIX
from minorca.evaluate.task_data import data_files, task_configs
from minorca.progress import progress

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict

# A task in the form of lm_eval's YAML files, with its number of shots and its data.
TaskConfig = dict[str, Any]
# The tasks of each member of each suite.
Prepared = dict[str, dict[str, list["Task"]]]
# Where the data of tasks is looked for.
DATA = Path("evaluation-data")


@dataclass(frozen=True)
class Member:
    """What a card lists as one number: a task, or several of which it takes the mean.

    Attributes:
        configure: gives the tasks, with their data from a directory.
        metric: as lm_eval's results name it, with the filter.
    """

    name: str
    configure: Callable[[Path], list[TaskConfig]]
    metric: str
    shots: int


@dataclass(frozen=True)
class Suite:
    """Attributes:
    averages: the names of the members of each average; the first average is the card's.
    """

    title: str
    members: tuple[Member, ...]
    averages: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Score:
    """A task's score or an average, in percent; of MT-Bench from 1 to 10.

    Attributes:
        stderr: the standard error, None where it is unknown.
        detail: metric and shots, or what the average is of.
        rows: how many rows were evaluated.
        available: how many rows there are, more than `rows` where a limit was set.
    """

    name: str
    value: float
    stderr: float | None
    detail: str
    rows: int
    available: int


@dataclass(frozen=True)
class SuiteResult:
    """Attributes:
    suite: its name on the command line.
    averages: the first is the one that the card quotes.
    evaluated: what lm_eval returned.
    """

    suite: str
    title: str
    averages: list[Score]
    members: list[Score]
    evaluated: dict[str, Any] = field(default_factory=dict, repr=False)


def _member(name: str, file: str, metric: str, shots: int = 0) -> Member:
    return Member(name, partial(task_configs, file, shots), metric, shots)


def _suite(title: str, members: Sequence[Member], average: str) -> Suite:
    return Suite(title, tuple(members), {average: tuple(member.name for member in members)})


AGIEVAL = ("aqua-rat", "logiqa-en", "lsat-ar", "lsat-lr", "lsat-rc", "sat-en", "sat-en-without-passage", "sat-math")
_LEADERBOARD = (
    _member("ARC", "arc/arc_challenge.yaml", "acc_norm,none", 25),
    _member("HellaSwag", "hellaswag/hellaswag.yaml", "acc_norm,none", 10),
    _member("MMLU", "mmlu/default/mmlu_*.yaml", "acc,none", 5),
    _member("TruthfulQA", "truthfulqa/truthfulqa_mc2.yaml", "acc,none"),
    _member("Winogrande", "winogrande/default.yaml", "acc,none", 5),
    _member("GSM8K", "gsm8k/gsm8k.yaml", "exact_match,strict-match", 5),
)
_GPT4ALL = (
    _member("hellaswag", "hellaswag/hellaswag.yaml", "acc_norm,none"),
    _member("openbookqa", "openbookqa/openbookqa.yaml", "acc_norm,none"),
    _member("winogrande", "winogrande/default.yaml", "acc,none"),
    _member("arc_easy", "arc/arc_easy.yaml", "acc_norm,none"),
    _member("arc_challenge", "arc/arc_challenge.yaml", "acc_norm,none"),
    _member("boolq", "super_glue/boolq/default.yaml", "acc,none"),
    _member("piqa", "piqa/piqa.yaml", "acc_norm,none"),
)
SUITES = {
    "leaderboard-v1": Suite(
        "HF leaderboard v1",
        _LEADERBOARD,
        {
            FOUR: ("ARC", "HellaSwag", "MMLU", "TruthfulQA"),
            SIX: tuple(member.name for member in _LEADERBOARD),
        },
    ),
    "agieval": _suite(
        "AGIEval", [_member(name, f"agieval/{name}.yaml", "acc_norm,none") for name in AGIEVAL], AGIEVAL_MEAN
    ),
    "bigbench-hard": _suite(
        "BigBench-Hard",
        [
            Member(name, lambda data, name=name: [bigbench.task_config(name, data)], f"{bigbench.METRIC},none", 0)
            for name in bigbench.TASKS
        ],
        BIGBENCH_MEAN,
    ),
    "gpt4all": _suite("GPT4ALL", _GPT4ALL, GPT4ALL_MEAN),
}
# suffixes of what is written beside a suite's results: the table and the picture
BESIDE = (".md", ".png")
MT_BENCH = "mt-bench"
SEED = "seed"
NAMES = (*SUITES, MT_BENCH, SEED)


def has_mt_bench(name: str | None) -> bool:
    return name in (MT_BENCH, SEED)


def prepare(name: str, data: Path = DATA, limit: int | None = None) -> Prepared:
    """Loads the tasks of a suite with their data; of `seed` all but MT-Bench, and of `mt-bench` none.

    Args:
        name: one of NAMES.
        data: the directory with the tasks' data.
        limit: of rows that are evaluated, and so are checked.

    Raises:
        UserError: every data set that is missing (what to download, and where to put it) or has another schema.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)
    problems: dict[str, UserError] = {}
    prepared: Prepared = {}
    for key, suite in SUITES.items():
        if name not in (key, SEED):
            continue
        prepared[key] = {}
        for member in progress(suite.members, f"reading the tasks of {key}", unit="tasks"):
            try:
                prepared[key][member.name] = [_load(config, manager, limit) for config in member.configure(data)]
            # two suites may miss the same data
            except UserError as error:
                problems |= {str(problem): problem for problem in error.problems}
    raise_problems(problems.values())
    return prepared


def _load(config: TaskConfig, manager: "TaskManager", limit: int | None) -> "Task":
    from minorca.evaluate.task_rows import check_rows

    evaluated = data_files(config, config.get("test_split") or config["validation_split"])
    log = logging.getLogger("lm_eval.api.task")
    level = log.level
    # it warns of what its own files leave to defaults
    log.setLevel(logging.ERROR)
    try:
        task: Any = manager.load([config])["tasks"][config["task"]]
    # whatever it raises where a file cannot be read, or its rows lack a column
    except Exception as error:
        raise _why(config, evaluated, error) from error
    finally:
        log.setLevel(level)
    check_rows(task, config["task"], evaluated, limit, is_known=True)
    return task


def _why(config: TaskConfig, evaluated: list[str], error: Exception) -> UserError:
    """Why lm_eval cannot make a task of its files."""
    from minorca.evaluate.task_rows import check_first_row, file_problems

    files = data_files(config)
    place = Path(files[0]).parent if files else None
    try:
        raise_problems(file_problems(files))
        raise_problems(_schema_problems(config))
        if not isinstance(error, KeyError):
            check_first_row(config, config["task"], evaluated)
    except UserError as found:
        return found
    if isinstance(error, KeyError):
        return UserError(f"lacks the column {error}, which {config['task']} needs", path=place)
    return UserError(f"{config['task']} cannot be loaded ({type(error).__name__}: {error})", path=place)


def _schema_problems(config: TaskConfig) -> Iterator[UserError]:
    """What is wrong with a task's local files."""
    import datasets

    from minorca.evaluate.task_rows import template_problems

    for file in data_files(config):
        try:
            rows = datasets.load_dataset(config["dataset_path"], data_files=file, split="train")
        except Exception as error:
            yield UserError(f"cannot be read as {config['dataset_path']} ({error})", path=file)
            continue
        if "process_docs" not in config:
            yield from template_problems(config, list(rows.features or ()), Path(file))


def run(prepared: Prepared, evaluate_tasks: Callable[["TaskDict"], dict]) -> list[SuiteResult]:
    """Evaluates suites.

    Args:
        evaluate_tasks: gives lm_eval's results of tasks; called once a suite, because two suites have the same task
            with other shots.
    """
    results = []
    for key, members in prepared.items():
        names = {member: [task.task_name for task in tasks] for member, tasks in members.items()}
        by_name = {task.task_name: task for tasks in members.values() for task in tasks}
        results.append(score(key, names, evaluate_tasks({"tasks": by_name})))
    return results


def score(key: str, names: Mapping[str, Sequence[str]], evaluated: dict) -> SuiteResult:
    """A suite's scores from lm_eval's results of its tasks.

    Args:
        names: those of the tasks of each member.
        evaluated: what lm_eval returned; its `results` and `n-samples` are read.
    """
    suite = SUITES[key]
    members = {}
    for member in suite.members:
        tasks = [_task_score(task, member.metric, evaluated) for task in names[member.name]]
        shots = f"{member.shots} shots" if member.shots else "zero-shot"
        of = f"mean of {len(tasks)} tasks, " if len(tasks) > 1 else ""
        members[member.name] = mean(member.name, tasks, f"{of}{member.metric.partition(',')[0]}, {shots}")
    averages = [
        mean(name, [members[member] for member in averaged], f"unweighted, {len(averaged)} tasks")
        for name, averaged in suite.averages.items()
    ]
    return SuiteResult(key, suite.title, averages, list(members.values()), evaluated)


def _task_score(task: str, metric: str, evaluated: dict) -> Score:
    result, rows = evaluated["results"][task], evaluated["n-samples"][task]
    name, _, filter = metric.partition(",")
    # "N/A" of a single row
    stderr = result.get(f"{name}_stderr,{filter}")
    percent = 100 * stderr if isinstance(stderr, float) else None
    return Score(task, 100 * result[metric], percent, metric, rows["effective"], rows["original"])


def mean(name: str, scores: Sequence[Score], detail: str) -> Score:
    """The unweighted mean of independent scores."""
    value = math.fsum(score.value for score in scores) / len(scores)
    squares = [score.stderr**2 for score in scores if score.stderr is not None]
    stderr = math.sqrt(math.fsum(squares)) / len(scores) if len(squares) == len(scores) else None
    return Score(
        name, value, stderr, detail, sum(score.rows for score in scores), sum(score.available for score in scores)
    )
