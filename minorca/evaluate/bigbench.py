"""The 18 tasks of BIG-bench that the OpenOrca card calls BigBench-Hard, as tasks of lm_eval.

They are the ones of the Nous suite, whose published tables name them. lm_eval's own tasks of BIG-bench need a hub and
do not split logical_deduction and tracking_shuffled_objects by the number of objects; its group `bbh` asks for a
written answer and measures something else.

A row is rendered as BIG-bench and that suite's harness do: task_prefix, example_input_prefix and the input, each choice
after choice_prefix where append_choices_to_input says so, and example_output_prefix, by default

    Q: INPUT
      choice: CHOICE
      choice: CHOICE
    A:

with a line feed in front of it and a space behind it. The choices are in one order for all rows of as many choices:
sorted, then permuted by numpy's RandomState(42). Equal rows count once. The model's answer is the likeliest choice, and
the score of a row, BIG-bench's multiple_choice_grade, is what target_scores gives it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy

from minorca.errors import UserError, raise_problems
from minorca.files.safe_io import quote, read_json

METRIC = "multiple_choice_grade"
# The task's name in published tables, and its directory in benchmark_tasks.
TASKS = {
    "causal_judgement": "causal_judgment",
    "date_understanding": "date_understanding",
    "disambiguation_qa": "disambiguation_qa",
    "geometric_shapes": "geometric_shapes",
    "logical_deduction_five_objects": "logical_deduction/five_objects",
    "logical_deduction_seven_objects": "logical_deduction/seven_objects",
    "logical_deduction_three_objects": "logical_deduction/three_objects",
    "movie_recommendation": "movie_recommendation",
    "navigate": "navigate",
    "reasoning_about_colored_objects": "reasoning_about_colored_objects",
    "ruin_names": "ruin_names",
    "salient_translation_error_detection": "salient_translation_error_detection",
    "snarks": "snarks",
    "sports_understanding": "sports_understanding",
    "temporal_sequences": "temporal_sequences",
    "tracking_shuffled_objects_five_objects": "tracking_shuffled_objects/five_objects",
    "tracking_shuffled_objects_seven_objects": "tracking_shuffled_objects/seven_objects",
    "tracking_shuffled_objects_three_objects": "tracking_shuffled_objects/three_objects",
}


def task_config(name: str, data: Path) -> dict[str, Any]:
    """A task in the form of lm_eval's configurations.

    Args:
        name: one of TASKS.
        data: the directory in which BIG-bench was unpacked.

    Raises:
        UserError: its file is not there (what to download), or has another schema (which field of which row).
    """
    rows = read_rows(_find(data, TASKS[name]))

    def load(**_) -> dict:
        import datasets

        return {"test": datasets.Dataset.from_list(rows)}

    return {
        "task": f"bigbench_{name}",
        "custom_dataset": load,
        "output_type": "multiple_choice",
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "target_delimiter": "",
        "process_results": grade,
        "metric_list": [{"metric": METRIC, "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def grade(doc: dict, results: list[tuple[float, bool]]) -> dict[str, float]:
    """The score of the likeliest choice, the first of equals."""
    logps = [logp for logp, _ in results]
    return {METRIC: doc["scores"][logps.index(max(logps))]}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a task.json: `query`, as rendered, `choices`, their `scores`, and `gold`, the index of the best.

    Raises:
        UserError: every row with another schema.
    """
    task = read_json(path)
    raise_problems(_problems(task, path))
    unique = {repr(example): example for example in task["examples"]}
    return [_to_row(task, example) for example in unique.values()]


def _to_row(task: dict, example: dict) -> dict[str, Any]:
    choices, scores = zip(*example["target_scores"].items())
    gold = scores.index(max(scores))
    return {"query": _render(task, example), "choices": [*choices], "scores": [*scores], "gold": gold}


def _render(task: dict, example: dict) -> str:
    text = task.get("task_prefix", "") + task.get("example_input_prefix", "\nQ: ") + example["input"]
    if task.get("append_choices_to_input", True):
        choices = sorted(example["target_scores"])
        prefix = task.get("choice_prefix", "\n  choice: ")
        text += "".join(prefix + choices[i] for i in numpy.random.RandomState(42).permutation(len(choices)))
    return text + task.get("example_output_prefix", "\nA: ")


def _problems(task: dict, path: Path) -> Iterator[UserError]:
    for key in ("task_prefix", "example_input_prefix", "example_output_prefix", "choice_prefix"):
        if not isinstance(task.get(key, ""), str):
            yield UserError(f"is {quote(task[key])}; expected text", path=path, field=key)
    if not isinstance(task.get("append_choices_to_input", True), bool):
        message = f"is {quote(task['append_choices_to_input'])}; expected true or false"
        yield UserError(message, path=path, field="append_choices_to_input")
    examples = task.get("examples")
    if not isinstance(examples, list) or not examples:
        yield UserError(f"is {quote(examples)}; expected a list of rows", path=path, field="examples")
        return
    for number, example in enumerate(examples):
        where = f"examples[{number}]"
        if not isinstance(example, dict):
            yield UserError(f"is {quote(example)}; expected an object", path=path, where=where)
            continue
        if not isinstance(example.get("input"), str):
            yield UserError(f"is {quote(example.get('input'))}; expected text", path=path, where=where, field="input")
        scores = example.get("target_scores")
        if not isinstance(scores, dict) or not scores or not all(isinstance(s, int | float) for s in scores.values()):
            message = f"is {quote(scores)}; expected an object of each choice's score"
            yield UserError(message, path=path, where=where, field="target_scores")


def _find(data: Path, directory: str) -> Path:
    places = [data, *sorted(data.glob("*")), *sorted(data.glob("*/bigbench"))]
    root = next((place / "benchmark_tasks" for place in places if (place / "benchmark_tasks").is_dir()), None)
    if root is None:
        raise UserError(
            "BIG-bench is not in it; unpack there what `pip download --no-deps --no-binary :all: --no-build-isolation "
            "bigbench==1.0.0` gives (358 MB), or clone github.com/google/BIG-bench there",
            path=data,
        )
    path = root / directory / "task.json"
    if not path.is_file():
        raise UserError("no such file; expected BIG-bench's", path=path)
    return path
