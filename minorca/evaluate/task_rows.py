"""The rows of lm_eval's tasks, checked before a model is loaded: whether a task's templates can write each of them, and
whether its answer is one of the choices.

lm_eval reports such mistakes by a traceback, by a warning without a row, or takes them for something else.
"""

import difflib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.utils import env

from minorca.data.row_files import RowError, open_file
from minorca.errors import UserError, raise_problems

# what of a task's file makes a text of a row
TEMPLATES = ("doc_to_text", "doc_to_choice", "doc_to_target")


def data_files(config: Mapping[str, Any], split: str | None = None) -> list[str]:
    """The local files of a task's data, or of a split of it, as its configuration names them."""
    named = (config.get("dataset_kwargs") or {}).get("data_files") or []
    if isinstance(named, dict):
        named = list(named.values()) if split is None else named.get(split, [])
    named = [named] if isinstance(named, str) else named
    return [path for item in named for path in ([item] if isinstance(item, str) else item)]


def file_problems(files: Sequence[str]) -> Iterator[UserError]:
    """Of each local file that cannot be read, or has no row, the first reason."""
    for file in files:
        path, rows = Path(file), 0
        try:
            reader = open_file(path)
            for number, record in reader.records():
                if isinstance(record, RowError):
                    raise UserError(record.message, path=path, where=f"{reader.unit} {number}")
                rows += 1
            if not rows:
                raise UserError("has no rows", path=path)
        except UserError as error:
            yield error


def template_problems(config: Mapping[str, Any], columns: list[str], path: str | Path | None) -> Iterator[UserError]:
    """The columns that a task's templates name and its data lack."""
    for field in TEMPLATES:
        template = config.get(field)
        # a function, a list or a number; or a column
        if not isinstance(template, str) or template in columns:
            continue
        try:
            names = jinja2.meta.find_undeclared_variables(env.parse(template))
        except jinja2.TemplateSyntaxError as error:
            yield UserError(f"is not a valid template: {error}", path=path, field=field)
            continue
        # a column's name alone, which lm_eval takes for text where there is none
        if template.isidentifier() and difflib.get_close_matches(template, columns, n=1):
            names = {template}
        for name in sorted(names - set(columns)):
            near = difflib.get_close_matches(name, columns, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            message = f"names the column {name}, which the data lack (they have {', '.join(columns)}){hint}"
            yield UserError(message, path=path, field=field)


def example_problems(task: Task, num_fewshot: int | None) -> Iterator[UserError]:
    """Whether a task has enough examples to draw from, of which a question is none of its own."""
    says = task.get_config("num_fewshot")
    # as in lm_eval, a task that says 0 stays at 0
    shots = (says if num_fewshot is None or says == 0 else num_fewshot) or 0
    if not isinstance(task, ConfigurableTask) or shots == 0:
        return
    rows = list(task.sampler.fewshot_docs()) if task.fewshot_docs() is not None else []
    if rows and task.fewshot_cfg.split == task.config.test_split:
        # nor is a row that equals it
        texts = Counter(json.dumps(row, sort_keys=True, default=str) for row in rows)
        there = len(rows) - max(texts.values())
    else:
        there = len(rows)
    if shots > there:
        message = f"is {shots}, and {task.task_name} has {len(rows)} rows to take examples from"
        message += ", which a question is not" if there < len(rows) else ""
        yield UserError(message, field="--num-fewshot")


def check_rows(task: ConfigurableTask, name: str | Path, files: Sequence[str], limit: int | None) -> None:
    """Checks that a task can make its texts of every row, and that every answer is one of the choices.

    Args:
        name: the task's file, or its name where it is lm_eval's own.
        files: those of the split that is evaluated.
        limit: of rows.

    Raises:
        UserError: the first row where that is not so.
    """
    config = task.config
    raise_problems(template_problems({field: config[field] for field in TEMPLATES}, task.features, name))
    place = files[0] if len(files) == 1 else name
    for number, doc in enumerate(islice(task.eval_docs, limit), 1):
        made: dict[str, Any] = {}
        for field in (*TEMPLATES, "process_results"):
            if config[field] is None:
                continue
            try:
                made[field] = _make(task, field, doc, made)
            except Exception as error:
                message = f"cannot be made of it ({type(error).__name__}: {error}), as {task.task_name} says"
                raise UserError(message, path=place, where=f"row {number}", field=field) from error
        for problem in _target_problems(task, made):
            problem.path, problem.where = place, f"row {number}"
            raise problem


def _make(task: ConfigurableTask, field: str, doc: Any, made: dict[str, Any]) -> Any:
    if field != "process_results":
        return getattr(task, field)(doc)
    # of generated texts nobody knows before what a task can read
    if task.OUTPUT_TYPE == "multiple_choice" and "doc_to_choice" in made:
        return task.process_results(doc, [(0.0, False)] * len(made["doc_to_choice"]))
    return None


def _target_problems(task: ConfigurableTask, made: dict[str, Any]) -> Iterator[UserError]:
    field = "doc_to_text" if task.multiple_input else "doc_to_target"
    # a function of the task's own knows what a target is
    if "doc_to_choice" not in made or "process_results" in made:
        return
    choices, value = made["doc_to_choice"], made.get(field)
    for target in value if isinstance(value, list) else [value]:
        if isinstance(target, int) and not 0 <= target < len(choices):
            message = f"is {target}, with {len(choices)} choices; expected 0 to {len(choices) - 1}"
            yield UserError(message, field=field)
        elif isinstance(target, str) and target not in choices and task.OUTPUT_TYPE == "multiple_choice":
            yield UserError(f"is {target!r}, which is none of the choices {choices!r}", field=field)
