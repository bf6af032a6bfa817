"""The rows of lm_eval's tasks, checked before a model is loaded: whether a task's templates can write each of them, and
whether its answer is one of the choices.

lm_eval reports such mistakes by a traceback, by a warning without a row, or takes them for something else.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.utils import env

from minorca.data.row_files import RowError, open_file
from minorca.errors import UserError, nearest, raise_problems
from minorca.files.safe_io import quote

# what of a task's file makes a text of a row
TEMPLATES = ("doc_to_text", "doc_to_choice", "doc_to_target")


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


def template_problems(
    config: Mapping[str, Any], columns: list[str], path: str | Path | None, needs_all: bool = True
) -> Iterator[UserError]:
    """The columns that a task's templates name and its data lack.

    Args:
        needs_all: whether those within an expression are needed. They are not where it asks whether they are defined.
    """
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
        names = names if needs_all else set()
        # a column's name alone, which lm_eval takes for text where there is none; or the text of a choice
        choices = config.get("doc_to_choice")
        if template.isidentifier() and not (isinstance(choices, list) and template in choices):
            names = {template}
        for name in sorted(names - set(columns)):
            message = f"names the column {name}, which the data lack (they have {', '.join(columns)})"
            yield UserError(message + nearest(name, columns), path=path, field=field)


def writes_by_config(task: ConfigurableTask) -> bool:
    """Whether a task's texts are what its configuration says, and not what a class of its own makes of rows."""
    methods = (*TEMPLATES, "process_results")
    return all(getattr(type(task), name) is getattr(ConfigurableTask, name) for name in methods)


def shots_of(task: Task, num_fewshot: int | None) -> int:
    """The examples before each question of a task: as in lm_eval, one that says 0 stays at 0."""
    says = task.get_config("num_fewshot")
    return (says if num_fewshot is None or says == 0 else num_fewshot) or 0


def example_problems(task: Task, num_fewshot: int | None, path: Path | None) -> Iterator[UserError]:
    """Whether a task has enough examples to draw from, of which a question is none of its own.

    path: the task's file, which may say how many it wants.
    """
    shots = shots_of(task, num_fewshot)
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
        if task.get_config("num_fewshot") == shots:
            yield UserError(message, path=path, field="num_fewshot")
        else:
            yield UserError(message, field="--num-fewshot")


def check_rows(
    task: ConfigurableTask, name: str | Path, files: Sequence[str], limit: int | None, is_known: bool = False
) -> None:
    """Checks that a task can make its texts of every row, and that every answer is one of the choices.

    Args:
        name: the task's file, or its name where it is lm_eval's own.
        files: those of the split that is evaluated.
        limit: of rows.
        is_known: whether published scores are of these rows: whatever they are, they count as they did there, where
            texts can be made of them.

    Raises:
        UserError: the first row where that is not so.
    """
    config = task.config
    templates = {field: config[field] for field in TEMPLATES if config[field] is not None}
    raise_problems(template_problems(templates, task.features, name, needs_all=False))
    writers = _writers(task, templates, is_known)
    place = files[0] if len(files) == 1 else name
    for number, doc in enumerate(islice(task.eval_docs, limit), 1):
        try:
            made = _write(task, writers, doc, place, f"row {number}")
        except UserError as error:
            if isinstance(error.__cause__, jinja2.UndefinedError):
                raise_problems(template_problems(templates, task.features, name))
            raise
        for problem in () if is_known else (*_text_problems(task, made), *_target_problems(task, made)):
            problem.path, problem.where = place, f"row {number}"
            raise problem


def check_first_row(config: Mapping[str, Any], name: str | Path, files: Sequence[str]) -> None:
    """As `check_rows`, of a task that lm_eval cannot make: it writes the first row when it does.

    Raises:
        UserError: what the row lacks. Nothing else is reported.
    """
    blank = {"doc_to_text": "", "doc_to_choice": None, "doc_to_target": ""}
    try:
        task = ConfigurableTask(config={**config, **blank})
    except Exception:
        return
    for field in TEMPLATES:
        task.config[field] = config.get(field)
    check_rows(task, name, files, 1)


def check_examples(task: ConfigurableTask, name: str | Path) -> None:
    """Checks that a task can make examples of every row that it may draw.

    Raises:
        UserError: the first row of which it cannot.
    """
    config = task.fewshot_cfg
    fields = {"doc_to_text": config.doc_to_text, "doc_to_choice": config.doc_to_choice}
    fields["doc_to_target"] = config.doc_to_target
    writers = _writers(task, {field: value for field, value in fields.items() if value is not None}, False)
    for number, doc in enumerate(task.fewshot_docs(), 1):
        place = f"row {number} of the examples"
        made = _write(task, writers, doc, name, place)
        if made.get("doc_to_target") is None:
            raise UserError("is null; expected text", path=name, where=place, field="doc_to_target")
        problems = [*_text_problems(task, made)]
        gold = "doc_to_text" if task.multiple_input else "doc_to_target"
        # an example's answer may be any text
        if isinstance(made.get(gold), Integral):
            problems += _index_problems(gold, made)
        for problem in problems:
            problem.path, problem.where = name, place
            raise problem


def _writers(task: ConfigurableTask, templates: Mapping[str, Any], is_known: bool) -> dict[str, Callable[[Any], Any]]:
    """By field, what makes its value of a row."""
    writers: dict[str, Callable[[Any], Any]] = {}
    for field, template in templates.items():
        make = partial(getattr(task, field), **{field: template})
        if isinstance(template, str) and template not in task.features and not is_known:
            strict = STRICT.from_string(template)
            # what lm_eval would write as None is an error
            writers[field] = partial(_render, strict, make)
        else:
            writers[field] = make
    if callable(task.config.process_results) and task.OUTPUT_TYPE == "multiple_choice":
        # of a text that a model will write nobody knows what a task can read
        writers["process_results"] = lambda doc: task.process_results(
            doc, [(0.0, False)] * len(task.doc_to_choice(doc))
        )
    return writers


def _write(
    task: ConfigurableTask, writers: Mapping[str, Callable[[Any], Any]], doc: Any, path: str | Path, where: str
) -> dict[str, Any]:
    made = {}
    for field, write in writers.items():
        try:
            made[field] = write(doc)
        except Exception as error:
            message = f"cannot be made of it ({type(error).__name__}: {error}), as {task.task_name} says"
            raise UserError(message, path=path, where=where, field=field) from error
    return made


def _render(strict: jinja2.Template, make: Callable[[Any], Any], doc: Any) -> Any:
    strict.render(**doc)
    return make(doc)


def _not_null(value: Any) -> Any:
    if value is None:
        raise ValueError("a column that it writes is null")
    return value


STRICT = env.overlay(finalize=_not_null)


def _text_problems(task: ConfigurableTask, made: Mapping[str, Any]) -> Iterator[UserError]:
    text, choices = made.get("doc_to_text", ""), made.get("doc_to_choice")
    if not isinstance(text, Integral if task.multiple_input else str):
        expected = "the number of a choice" if task.multiple_input else "text"
        yield UserError(f"is {quote(text)}; expected {expected}", field="doc_to_text")
    if "doc_to_choice" in made and not (
        isinstance(choices, list | tuple) and choices and all(isinstance(text, str) for text in choices)
    ):
        yield UserError(f"is {quote(choices)}; expected a list of texts", field="doc_to_choice")


def _target_problems(task: ConfigurableTask, made: Mapping[str, Any]) -> Iterator[UserError]:
    target = made.get("doc_to_target")
    # a function of the task's own knows what a target is
    is_own = callable(task.config.process_results)
    if task.OUTPUT_TYPE == "multiple_choice":
        if not is_own:
            yield from _index_problems("doc_to_text" if task.multiple_input else "doc_to_target", made)
    elif task.OUTPUT_TYPE == "generate_until":
        values = target if isinstance(target, list) else [target]
        if not is_own and not (values and all(isinstance(value, str | Real) for value in values)):
            yield UserError(f"is {quote(target)}; expected text", field="doc_to_target")
        if "doc_to_choice" in made:
            yield from _index_problems("doc_to_target", made)
    elif not isinstance(target, str) or not (target or task.OUTPUT_TYPE == "loglikelihood_rolling"):
        yield UserError(f"is {quote(target)}; expected text", field="doc_to_target")


def _index_problems(field: str, made: Mapping[str, Any]) -> Iterator[UserError]:
    """Whether a target is one of the choices, or each of several: its number from 0, or its text."""
    choices, value = made.get("doc_to_choice"), made.get(field)
    if not choices:
        return
    for target in value if isinstance(value, list) else [value]:
        if isinstance(target, Integral) and not 0 <= int(target) < len(choices):
            message = f"is {target}, with {len(choices)} choices; expected 0 to {len(choices) - 1}"
            yield UserError(message, field=field)
        elif not isinstance(target, Integral) and target not in choices:
            yield UserError(f"is {quote(target)}, which is none of the choices {quote(choices)}", field=field)
