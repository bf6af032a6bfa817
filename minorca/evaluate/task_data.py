"""lm_eval's tasks with their data from a directory, and what to download where it is missing.

A data set of the hub has its own directory, such as DIR/allenai/ai2_arc, in which its files lie as `hf download` lays
them: those of a split begin with its name (train-00000-of-00001.parquet, or train.jsonl), in a directory of the
configuration's name where there are several.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minorca.errors import UserError, raise_problems

# The builders of `datasets`, and the suffixes of their files.
FORMATS = {"parquet": (".parquet",), "json": (".jsonl", ".json")}


def task_configs(pattern: str, shots: int, data: Path) -> list[dict[str, Any]]:
    """Tasks of lm_eval, configured with their number of shots and their data.

    Args:
        pattern: their YAML files in lm_eval's tasks.
        data: the directory of the data sets; those that are not in it come from the hub, or from the hub's cache.

    Raises:
        UserError: a data set is in neither; what to download, and where to put it.
    """
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    root = Path(lm_eval.tasks.__file__).parent
    configs = [load_yaml(path) | {"num_fewshot": shots} for path in sorted(root.glob(pattern))]
    for config in configs:
        config |= _local_data(config, data) or _check_hub(config, data, len(configs) > 1)
    return configs


def data_files(config: Mapping[str, Any], split: str | None = None) -> list[str]:
    """The local files of a task's data, or of a split of it, as its configuration names them."""
    named = (config.get("dataset_kwargs") or {}).get("data_files") or []
    if isinstance(named, dict):
        named = list(named.values()) if split is None else named.get(split, [])
    named = [named] if isinstance(named, str) else named
    return [path for item in named for path in ([item] if isinstance(item, str) else item)]


def _splits(config: dict) -> dict[str, str]:
    """The splits that a task needs, by their keys in its configuration."""
    key = "test_split" if config.get("test_split") else "validation_split"
    splits = {key: config[key]}
    if config["num_fewshot"]:
        splits["fewshot_split"] = config.get("fewshot_split") or config["training_split"]
    return splits


def _local_data(config: dict, data: Path) -> dict | None:
    """What makes lm_eval read a data set from its directory; None where that does not have all splits."""
    splits = _splits(config)
    directory = data / config["dataset_path"]
    name = config.get("dataset_name")
    paths = sorted(path for path in directory.rglob("*") if not name or name in path.relative_to(directory).parts[:-1])
    for builder, suffixes in FORMATS.items():
        files = {
            split: [str(path) for path in paths if path.suffix in suffixes and re.match(rf"{split}[-_.]", path.name)]
            for split in splits.values()
        }
        if all(files.values()):
            raise_problems(problem for split in files.items() for problem in _split_problems(*split, directory))
            # lm_eval opens every split that a configuration names, needed or not
            unused = dict.fromkeys(("training_split", "validation_split", "test_split", "fewshot_split"))
            source = {"dataset_path": builder, "dataset_name": None, "dataset_kwargs": {"data_files": files}}
            return unused | splits | source
    return None


def _split_problems(split: str, files: list[str], directory: Path) -> Iterator[UserError]:
    """Whether files are all those of a split, and no other."""
    parts = [re.search(r"-(\d+)-of-(\d+)\b", Path(file).name) for file in files]
    counts = {int(part[2]) for part in parts if part}
    if len(files) > 1 and (None in parts or len(counts) > 1):
        names = ", ".join(str(Path(file).relative_to(directory)) for file in files)
        yield UserError(f"has {split} more than once: {names}; leave one of them", path=directory)
    elif counts and len(files) != max(counts):
        yield UserError(f"has {len(files)} of the {max(counts)} files of {split}; download the others", path=directory)


def _check_hub(config: dict, data: Path, whole: bool) -> dict:
    """Nothing to change. Raises UserError where the hub, or its cache, does not give the data.

    Args:
        whole: whether all of the data set is wanted, or only the task's configuration.
    """
    import datasets

    path, name = config["dataset_path"], config.get("dataset_name")
    try:
        datasets.load_dataset(path, name)
    # whatever the network, the hub or its cache make it raise
    except Exception as error:
        directory = data / path
        include = f" --include '{name}/*'" if name and not whole else ""
        splits = " and ".join(f"{split}.jsonl" for split in _splits(config).values())
        raise UserError(
            f"lacks the data of {config['task']}, and the hub did not give it ({error}); download it: hf download "
            f"{path} --repo-type dataset{include} --local-dir {directory}; or put {splits}, with the data set's "
            f"columns, in {directory / (name or '')}",
            path=directory,
        ) from None
    return {}
