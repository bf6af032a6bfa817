"""lm_eval's tasks by name, from its own folder and the user's, checked before a model is loaded.

lm_eval reports mistakes in a task's file or its data by a traceback, or takes them for something else. Task files are
the user's own, like a configuration: they may name Python functions, which lm_eval runs.
"""

import difflib
import fnmatch
import glob
import random
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import NamedTuple, cast

import jinja2
import jinja2.meta
import lm_eval.api.metrics  # noqa: F401  (which fills METRIC_REGISTRY)
import numpy as np
import torch
import yaml
from lm_eval.api.group import Group
from lm_eval.api.registry import METRIC_REGISTRY
from lm_eval.api.task import ALL_OUTPUT_TYPES, ConfigurableTask, Task
from lm_eval.config.task import TaskConfig
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import env

from minorca.errors import UserError, raise_problems

# what a task's file may have beside the fields of TaskConfig
STRUCTURE = {"tag", "group", "task_list", "include", "class"}
# what of a task's file makes a text of a row
TEMPLATES = ("doc_to_text", "doc_to_choice", "doc_to_target")


class Tasks(NamedTuple):
    """Tasks and groups, and the manager that they come from."""

    tasks: list[Task | Group]
    manager: TaskManager


def load_tasks(
    names: Collection[str], include_path: Path | None = None, limit: int | None = None, num_fewshot: int | None = None
) -> Tasks:
    """The tasks and groups of these names, which may be patterns such as mmlu_*, with their data.

    Args:
        include_path: a folder of the user's task files, which are checked. lm_eval's own take long to find, and are
            looked for only where this folder lacks a name.
        limit: of rows that are evaluated, and so are checked.
        num_fewshot: the examples before each question; None: what each task says.

    Raises:
        UserError: unknown names; task files that are invalid; data that is missing, or lacks what its task names; too
            few examples.
    """
    if include_path is not None and not include_path.is_dir():
        raise UserError("is not a directory; expected one with the YAML files of tasks", field="--include-path")
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise UserError("names no task", field="--tasks")
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not all(_matches(name, manager) for name in names):
        raise_problems(_unreadable(include_path))
        manager = TaskManager(include_path=include_path)
    raise_problems(_unknown(name, manager) for name in names if not _matches(name, manager))
    chosen = list(dict.fromkeys(match for name in names for match in _matches(name, manager)))
    leaves = [leaf for name in chosen for leaf in _leaves(name, manager)]
    raise_problems(_twice(leaves))
    own = [leaf for leaf in leaves if include_path and leaf.yaml_path and leaf.yaml_path.is_relative_to(include_path)]
    raise_problems(problem for leaf in own for problem in _file_problems(leaf))
    # as lm_eval's own command does: tasks' functions may shuffle their rows
    random.seed(0)
    np.random.seed(1234)
    torch.manual_seed(1234)
    tasks = [task for name in chosen for task in _load(name, manager)]
    loaded = manager.load(tasks)["tasks"]
    raise_problems(problem for task in loaded.values() for problem in _task_problems(task))
    raise_problems(problem for task in loaded.values() for problem in _example_problems(task, num_fewshot))
    for leaf in own:
        task = loaded[leaf.name]
        if isinstance(task, ConfigurableTask):
            _check_rows(task, leaf, limit)
    return Tasks(tasks, manager)


# -------------------------------------------------------------------------------------------------------------- names


def _matches(name: str, manager: TaskManager) -> list[str]:
    return fnmatch.filter(manager.all_tasks, name)


def _unknown(name: str, manager: TaskManager) -> UserError:
    near = difflib.get_close_matches(name, manager.all_tasks, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return UserError(f"{name} is an unknown task{hint}", field="--tasks")


def _unreadable(include_path: Path | None) -> Iterator[UserError]:
    """Of each file that lm_eval passes over, why."""
    for path in sorted(include_path.glob("**/*.yaml")) if include_path else ():
        try:
            load_yaml(path, resolve_func=False)
        except (OSError, ValueError, yaml.YAMLError) as error:
            yield UserError(f"cannot be read as a task: {' '.join(str(error).split())}", path=path)


def _leaves(name: str, manager: TaskManager) -> Iterator[Entry]:
    """The tasks of a task, a group or a tag, as lm_eval's index describes them."""
    entry = manager.task_index.get(name)
    if entry is None:
        # a task that a group defines itself
        return
    if entry.kind is Kind.TAG:
        members = sorted(entry.tags)
    elif entry.kind is Kind.GROUP:
        items = (entry.cfg or {}).get("task") or []
        members = [item if isinstance(item, str) else item.get("group") or item.get("task") for item in items]
    else:
        yield entry
        return
    for member in members:
        yield from _leaves(member, manager)


def _twice(leaves: list[Entry]) -> Iterator[UserError]:
    names = [leaf.name for leaf in leaves]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield UserError(f"has {name} twice: by itself and in a group, or in two groups", field="--tasks")


# -------------------------------------------------------------------------------------------------------------- files


def _file_problems(leaf: Entry) -> Iterator[UserError]:
    """What is wrong with a task's file, before its data are read."""
    config = leaf.cfg or {}
    # whose class reads it
    if leaf.kind is Kind.PY_TASK:
        return
    known = {field.name for field in fields(TaskConfig)} | STRUCTURE
    for key in sorted(config.keys() - known, key=str):
        near = difflib.get_close_matches(str(key), known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        yield UserError(f"is an unknown key{hint}", path=leaf.yaml_path, field=str(key))
    kind = config.get("output_type", ALL_OUTPUT_TYPES[0])
    if kind not in ALL_OUTPUT_TYPES:
        expected = ", ".join(ALL_OUTPUT_TYPES)
        yield UserError(f"is {kind!r}; expected one of {expected}", path=leaf.yaml_path, field="output_type")
    for metric in () if "process_results" in config else config.get("metric_list") or ():
        name = metric.get("metric")
        if isinstance(name, str) and name not in METRIC_REGISTRY and not metric.get("hf_evaluate"):
            near = difflib.get_close_matches(name, METRIC_REGISTRY, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            yield UserError(f"has the unknown metric {name}{hint}", path=leaf.yaml_path, field="metric_list")
    for path in _data_files(config):
        if "://" not in path and not glob.glob(path, recursive=True):
            message = f"names {path}, which does not exist; paths are relative to the current directory"
            yield UserError(message, path=leaf.yaml_path, field="dataset_kwargs.data_files")


def _data_files(config: Mapping, split: str | None = None) -> list[str]:
    """The local files of a task's data, or of a split of it."""
    named = (config.get("dataset_kwargs") or {}).get("data_files") or []
    if isinstance(named, dict):
        named = list(named.values()) if split is None else named.get(split, [])
    named = [named] if isinstance(named, str) else named
    return [path for item in named for path in ([item] if isinstance(item, str) else item)]


def _load(name: str, manager: TaskManager) -> list[Task | Group]:
    """A group, or the tasks of a tag, or a task."""
    try:
        loaded = manager.load([name])
    # a task's file and its functions may raise anything
    except Exception as error:
        for leaf in _leaves(name, manager):
            try:
                manager.load([leaf.name])
            except Exception as of_leaf:
                raise _why(leaf, of_leaf) from of_leaf
        raise UserError(f"cannot be loaded: {_say(error)}", field=name) from error
    group = loaded.get("groups", {}).get(name)
    return [group] if group else list(loaded["tasks"].values())


def _why(leaf: Entry, error: Exception) -> UserError:
    """Why lm_eval cannot make a task of a file and its data."""
    config = leaf.cfg or {}
    if isinstance(error, ConnectionError | FileNotFoundError):
        message = (
            f"names {config.get('dataset_path')}, which cannot be loaded ({_say(error)}); run once with a network "
        )
        message += "to download it, or name files of yours in a task of your own (--include-path)"
        return UserError(message, path=leaf.yaml_path, field="dataset_path")
    unknown = UserError(f"task {leaf.name} cannot be loaded: {_say(error)}", path=leaf.yaml_path)
    try:
        config = {key: value for key, value in load_yaml(cast(Path, leaf.yaml_path)).items() if key not in STRUCTURE}
        # lm_eval writes the first row when it makes a task: one without templates can be made
        task = ConfigurableTask(config=config | {"doc_to_text": "", "doc_to_choice": None, "doc_to_target": ""})
    except Exception:
        return unknown
    for field in TEMPLATES:
        task.config[field] = config.get(field)
    try:
        _check_rows(task, leaf, 1)
    except UserError as found:
        return found
    return unknown


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


# --------------------------------------------------------------------------------------------------------------- rows


def template_problems(config: Mapping, columns: list[str], path: Path | None) -> Iterator[UserError]:
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


def _task_problems(task: Task) -> Iterator[UserError]:
    if getattr(task, "UNSAFE_CODE", False):
        yield UserError(f"has {task.task_name}, which runs code that a model writes; that is not done", field="--tasks")
    if getattr(task, "MULTIMODAL", False):
        yield UserError(f"has {task.task_name}, which shows pictures, and the model reads text only", field="--tasks")


def _example_problems(task: Task, num_fewshot: int | None) -> Iterator[UserError]:
    """Whether a task has enough examples to draw from, of which a question is none of its own."""
    says = task.get_config("num_fewshot")
    # as in lm_eval, a task that says 0 stays at 0
    shots = (says if num_fewshot is None or says == 0 else num_fewshot) or 0
    if not isinstance(task, ConfigurableTask) or shots == 0:
        return
    there = len(task.sampler.fewshot_docs()) if task.fewshot_docs() is not None else 0
    if shots + (task.fewshot_cfg.split == task.config.test_split) > there:
        message = f"is {shots}, and {task.task_name} has {there} rows to take examples from, which a question is not"
        yield UserError(message, field="--num-fewshot")


def _check_rows(task: ConfigurableTask, leaf: Entry, limit: int | None) -> None:
    """Checks that the templates can write every row, and that every target is one of the choices.

    Raises:
        UserError: the first row that they cannot write.
    """
    config = task.config
    raise_problems(template_problems({field: config[field] for field in TEMPLATES}, task.features, leaf.yaml_path))
    split = config.test_split if task.has_test_docs() else config.validation_split
    files = _data_files(leaf.cfg or {}, split)
    place = files[0] if len(files) == 1 else leaf.yaml_path
    for number, doc in enumerate(islice(task.eval_docs, limit), 1):
        for field in TEMPLATES:
            if config[field] is None:
                continue
            try:
                value = getattr(task, field)(doc)
            except Exception as error:
                message = f"cannot be made of it ({_say(error)}), as {leaf.yaml_path} says"
                raise UserError(message, path=place, where=f"row {number}", field=field) from error
            if field == "doc_to_choice":
                choices = value
        if config.doc_to_choice is not None and isinstance(value, int) and not 0 <= value < len(choices):
            message = f"is {value}, with {len(choices)} choices; expected 0 to {len(choices) - 1}"
            raise UserError(message, path=place, where=f"row {number}", field="doc_to_target")
