"""lm_eval's tasks by name, from its own folder and the user's, checked before a model is loaded.

lm_eval reports mistakes in a task's file or its data by a traceback, or takes them for something else. Task files are
the user's own, like a configuration: they may name Python functions, which lm_eval runs.
"""

import fnmatch
import glob
import random
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, cast

import lm_eval.api.metrics  # noqa: F401  (which fills METRIC_REGISTRY)
import numpy as np
import torch
import yaml
from lm_eval.api.group import Group
from lm_eval.api.registry import AGGREGATION_REGISTRY, METRIC_REGISTRY
from lm_eval.api.task import ALL_OUTPUT_TYPES, ConfigurableTask, Task
from lm_eval.config.task import TaskConfig
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml

from minorca.errors import UserError, nearest, raise_problems
from minorca.evaluate.task_data import data_files
from minorca.evaluate.task_rows import (
    check_examples,
    check_first_row,
    check_rows,
    example_problems,
    file_problems,
    shots_of,
    writes_by_config,
)
from minorca.evaluate.task_trial import try_tasks
from minorca.files.safe_io import check_hub_cache, quote

# what a task's file may have beside the fields of TaskConfig
STRUCTURE = {"tag", "group", "task_list", "include", "class"}
# data sets that are nothing but the files that are named
BUILDERS = ("json", "csv", "parquet", "text", "arrow")
SPLITS = ("test_split", "validation_split", "training_split", "fewshot_split")


class Tasks(NamedTuple):
    """Tasks and groups, and the manager that they come from."""

    tasks: list[Task | Group]
    manager: TaskManager


def load_tasks(
    names: Collection[str], include_path: Path | None = None, limit: int | None = None, num_fewshot: int | None = None
) -> Tasks:
    """The tasks and groups of these names, which may be patterns such as mmlu_*, with their data. What is in a group
    that is chosen too is loaded with it alone.

    Args:
        include_path: a folder of the user's task files, which are checked. lm_eval's own take long to find, and are
            looked for only where this folder lacks a name.
        limit: of rows that are evaluated, and so are checked.
        num_fewshot: the examples before each question; None: what each task says.

    Raises:
        UserError: unknown names; task files that are invalid; data that is missing, or lacks what its task names; too
            few examples; no home directory for their cache.
    """
    check_hub_cache()
    if include_path is not None and not include_path.is_dir():
        raise UserError("is not a directory; expected one with the YAML files of tasks", field="--include-path")
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise UserError("names no task", field="--tasks")
    try:
        manager = TaskManager(include_path=include_path, include_defaults=False)
    # of names that are numbers
    except TypeError:
        raise_problems(_unreadable(include_path))
        raise
    if list(_unknown(names, manager)):
        raise_problems(_unreadable(include_path))
        manager = TaskManager(include_path=include_path)
        raise_problems(_unknown(names, manager))
    chosen = _chosen([match for name in names for match in _matches(name, manager)], manager)
    folder = include_path and include_path.resolve()
    entries = [entry for name in chosen for entry in _entries(name, manager)]
    own = [each for each in entries if folder and each.yaml_path and each.yaml_path.resolve().is_relative_to(folder)]
    raise_problems(problem for entry in own if _is_task(entry) for problem in _file_problems(entry))
    # as lm_eval's own command does: tasks' functions may shuffle their rows
    random.seed(0)
    np.random.seed(1234)
    torch.manual_seed(1234)
    tasks = [task for name in chosen for task in _load(name, manager)]
    loaded = manager.load(tasks)["tasks"]
    raise_problems(problem for task in loaded.values() for problem in _kind_problems(task))
    paths = {entry.name: cast(Path, entry.yaml_path) for entry in own}
    raise_problems(
        problem for name, task in loaded.items() for problem in example_problems(task, num_fewshot, paths.get(name))
    )
    for entry in own:
        task = loaded.get(entry.name)
        if isinstance(task, ConfigurableTask) and writes_by_config(task):
            split = task.config.test_split if task.has_test_docs() else task.config.validation_split
            check_rows(task, paths[entry.name], data_files(entry.cfg or {}, split), limit)
            if shots_of(task, num_fewshot):
                check_examples(task, paths[entry.name])
    groups = {group.name: group for group in tasks if isinstance(group, Group)}
    for name, path in paths.items():
        # a group within another is tried with that
        if part := loaded.get(name) or groups.get(name):
            try_tasks(manager.load([part]), num_fewshot, name, path)
    return Tasks(tasks, manager)


# -------------------------------------------------------------------------------------------------------------- names


def _matches(name: str, manager: TaskManager) -> list[str]:
    return fnmatch.filter(_names(manager), name)


def _names(manager: TaskManager) -> list[str]:
    # a file may name a task by a number
    return [name for name in manager.all_tasks if isinstance(name, str)]


def _unknown(names: Iterable[str], manager: TaskManager) -> Iterator[UserError]:
    """Names that nothing has, and those of groups' members."""
    for name in names:
        matches = _matches(name, manager)
        if not matches:
            yield UserError(f"{name} is an unknown task{nearest(name, _names(manager), n=3)}", field="--tasks")
        for match in matches:
            yield from _unknown_members(match, manager)


def _unreadable(include_path: Path | None) -> Iterator[UserError]:
    """Of each file that lm_eval passes over, why."""
    for path in sorted(include_path.glob("**/*.yaml")) if include_path else ():
        try:
            config = load_yaml(path, resolve_func=False)
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            yield UserError(f"cannot be read as a task: {' '.join(str(error).split())}", path=path)
            continue
        field = "group" if "group" in config else "task"
        if not isinstance(config.get(field, ""), str):
            yield UserError(f"is {quote(config[field])}; expected a name", path=path, field=field)


def _members(config: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """The names of a group's members, and whether it defines them itself."""
    for item in config.get("task") or []:
        if isinstance(item, str):
            yield item, False
        elif "group" in item and "task" in item:
            yield from _members(item)
        else:
            yield item.get("group") or item["task"], "dataset_path" in item


def _entries(name: str, manager: TaskManager, within: tuple[str, ...] = ()) -> Iterator[Entry]:
    """What lm_eval's index has of a name and, where it is a group or a tag, of all below it.

    Raises:
        UserError: a group's file is invalid, or it is in itself.
    """
    entry = manager.task_index.get(name)
    if entry is None:
        # a task that a group defines itself, or one that is unknown
        return
    members = sorted(entry.tags) if entry.kind is Kind.TAG else []
    if entry.kind is Kind.GROUP:
        if name in within:
            raise UserError(f"has {name}, which is in itself", path=entry.yaml_path, field="task")
        raise_problems(_group_problems(entry.cfg or {}, entry.yaml_path))
        members = [member for member, _ in _members(entry.cfg or {})]
    yield entry
    for member in members:
        yield from _entries(member, manager, (*within, name))


def _is_task(entry: Entry) -> bool:
    return entry.kind not in (Kind.GROUP, Kind.TAG)


def _leaves(name: str, manager: TaskManager) -> list[Entry]:
    """The tasks of a task, a group or a tag."""
    return [entry for entry in _entries(name, manager) if _is_task(entry)]


def _chosen(matches: list[str], manager: TaskManager) -> list[str]:
    """The groups that are in no other one, and the tasks that are in none of them.

    Raises:
        UserError: two groups have the same task.
    """
    groups = [name for name in dict.fromkeys(matches) if manager.task_index[name].kind is Kind.GROUP]
    below = {entry.name for name in groups for entry in [*_entries(name, manager)][1:]}
    kept = [name for name in groups if name not in below]
    owners: dict[str, list[str]] = {}
    for name in kept:
        for leaf in {leaf.name for leaf in _leaves(name, manager)}:
            owners.setdefault(leaf, []).append(name)
    shared = {tuple(names): leaf for leaf, names in sorted(owners.items(), reverse=True) if len(names) > 1}
    raise_problems(
        UserError(f"has the groups {' and '.join(names)}, which share tasks such as {leaf}", field="--tasks")
        for names, leaf in sorted(shared.items())
    )
    others = [leaf.name for name in dict.fromkeys(matches) if name not in groups for leaf in _leaves(name, manager)]
    return [*kept, *dict.fromkeys(name for name in others if name not in owners)]


def _group_problems(config: Mapping[str, Any], path: Path | None) -> Iterator[UserError]:
    members = config.get("task")
    if not isinstance(members, list) or not members:
        yield UserError(f"is {quote(members)}; expected a list of tasks and groups", path=path, field="task")
        return
    for member in members:
        if isinstance(member, dict) and isinstance(member.get("group"), str) and "task" in member:
            yield from _group_problems(member, path)
        elif not isinstance(member, str) and not (
            isinstance(member, dict) and isinstance(member.get("group") or member.get("task"), str)
        ):
            message = f"has {quote(member)}; expected a name, or a mapping with the name as task or group"
            yield UserError(message, path=path, field="task")


def _unknown_members(name: str, manager: TaskManager) -> Iterator[UserError]:
    for entry in _entries(name, manager):
        for member, is_own in _members(entry.cfg or {}) if entry.kind is Kind.GROUP else ():
            if not is_own and member not in manager.task_index:
                hint = nearest(member, _names(manager), n=3)
                yield UserError(f"has the unknown {member}{hint}", path=entry.yaml_path, field="task")


# -------------------------------------------------------------------------------------------------------------- files


def _file_problems(leaf: Entry) -> Iterator[UserError]:
    """What is wrong with a task's file, before its data are read."""
    config = leaf.cfg or {}
    # whose class reads it
    if leaf.kind is Kind.PY_TASK:
        return
    known = {field.name for field in fields(TaskConfig)} | STRUCTURE
    for key in sorted(config.keys() - known, key=str):
        yield UserError(f"is an unknown key{nearest(str(key), known)}", path=leaf.yaml_path, field=str(key))
    kind = config.get("output_type", ALL_OUTPUT_TYPES[0])
    if kind not in ALL_OUTPUT_TYPES:
        expected = ", ".join(ALL_OUTPUT_TYPES)
        yield UserError(f"is {kind!r}; expected one of {expected}", path=leaf.yaml_path, field="output_type")
    try:
        # with the functions that it names, whatever they do when they are imported
        config = load_yaml(cast(Path, leaf.yaml_path))
    except Exception:
        # as loading the task will say
        return
    wrong = list(_type_problems(config))
    for problem in wrong:
        problem.path = leaf.yaml_path
        yield problem
    if wrong or config.get("dataset_path") not in BUILDERS or "data_dir" in (config.get("dataset_kwargs") or {}):
        return
    for path in data_files(config):
        if "://" not in path and not glob.glob(path, recursive=True):
            message = f"names {path}, which does not exist; paths are relative to the current directory"
            yield UserError(message, path=leaf.yaml_path, field="dataset_kwargs.data_files")


def _type_problems(config: Mapping[str, Any]) -> Iterator[UserError]:
    """Values that lm_eval would stumble over."""
    if not config.get("dataset_path") and not config.get("custom_dataset"):
        yield UserError("is missing; expected a data set's name, or json, csv or parquet", field="dataset_path")
    if config.get("output_type") == "multiple_choice" and config.get("doc_to_choice") is None:
        yield UserError("is missing; multiple_choice needs it", field="doc_to_choice")

    def wrong(field: str, value: Any, expected: str) -> UserError:
        return UserError(f"is {quote(value)}; expected {expected}", field=field)

    for field in ("dataset_kwargs", "generation_kwargs"):
        if not isinstance(config.get(field), dict | None):
            yield wrong(field, config[field], "a mapping")
    shots = config.get("num_fewshot")
    if not isinstance(shots, int | None) or isinstance(shots, bool) or (shots or 0) < 0:
        yield wrong("num_fewshot", shots, "a number, 0 or more")
    kwargs = config.get("dataset_kwargs")
    named = kwargs.get("data_files", []) if isinstance(kwargs, dict) else []
    for files in named.values() if isinstance(named, dict) else [named]:
        if not isinstance(files, str) and not (
            isinstance(files, list) and all(isinstance(file, str) for file in files)
        ):
            yield wrong("dataset_kwargs.data_files", files, "a path, or a list of paths, by split")
    metrics = config.get("metric_list")
    if not isinstance(metrics, list | None):
        yield wrong("metric_list", metrics, "a list of mappings, each with a metric")
        return
    for metric in metrics or ():
        if not isinstance(metric, dict) or "metric" not in metric:
            yield wrong("metric_list", metric, "a mapping with a metric")
            continue
        is_own = "process_results" in config or metric.get("hf_evaluate")
        for key, known in (() if is_own else (("metric", METRIC_REGISTRY),)) + (("aggregation", AGGREGATION_REGISTRY),):
            name = metric.get(key)
            if isinstance(name, str) and name not in known:
                yield UserError(f"has the unknown {key} {name}{nearest(name, known)}", field="metric_list")


def _kind_problems(task: Task) -> Iterator[UserError]:
    if getattr(task, "UNSAFE_CODE", False):
        yield UserError(f"has {task.task_name}, which runs code that a model writes; that is not done", field="--tasks")
    if getattr(task, "MULTIMODAL", False):
        yield UserError(f"has {task.task_name}, which shows pictures, and the model reads text only", field="--tasks")


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
        path = manager.task_index[name].yaml_path
        raise UserError(f"{name} cannot be loaded: {_say(error)}", path=path) from error
    group = loaded.get("groups", {}).get(name)
    return [group] if group else list(loaded["tasks"].values())


def _why(leaf: Entry, error: Exception) -> UserError:
    """Why lm_eval cannot make a task of a file and its data."""
    config = leaf.cfg or {}
    files = [file for pattern in data_files(config) for file in glob.glob(pattern, recursive=True)]
    if found := next(file_problems(files), None):
        return found
    splits = [key for key in SPLITS if isinstance(error, KeyError) and config.get(key) in error.args]
    if splits:
        return UserError(f"is {error}, which the data lack", path=leaf.yaml_path, field=splits[0])
    if isinstance(error, ConnectionError | FileNotFoundError):
        message = (
            f"names {config.get('dataset_path')}, which cannot be loaded ({_say(error)}); run once with a network "
        )
        message += "to download it, or name files of yours in a task of your own (--include-path)"
        return UserError(message, path=leaf.yaml_path, field="dataset_path")
    try:
        config = {key: value for key, value in load_yaml(cast(Path, leaf.yaml_path)).items() if key not in STRUCTURE}
        check_first_row(config, cast(Path, leaf.yaml_path), files)
    except UserError as found:
        return found
    except Exception:
        # as the error says
        pass
    return UserError(f"task {leaf.name} cannot be loaded: {_say(error)}", path=leaf.yaml_path)


def _say(error: BaseException) -> str:
    """What it says, or what lies behind it: `datasets` says "an error occurred"."""
    return _say(error.__cause__) if error.__cause__ else f"{type(error).__name__}: {error}"
