"""Reads the rows of hub data sets, by way of `datasets`."""

import hashlib
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

from minorca.config import Source
from minorca.data.row_files import NumberedRecord, RowFile, drop_null_fields
from minorca.errors import UserError
from minorca.files.hub import HubId, resolve
from minorca.files.safe_io import check_hub_cache

_SOURCE = re.compile("([^@:]*)(?:@([^:]+))?(?::(.*))?", re.S)


def parse_source(path: str) -> tuple[HubId, str]:
    """The hub id of org/name[@REVISION][:FILE], and the file, or nothing."""
    match = _SOURCE.fullmatch(path)
    repository, revision, file = match.groups() if match else (path, None, "")
    return HubId(repository, revision), file or ""


def pinned_source(path: str) -> str | None:
    """The same at the commit that it names now; None where this cannot be known."""
    found, file = parse_source(path)
    try:
        commit = HubId(found.repository, resolve(found, "dataset"))
    except UserError:
        # `open_hub` says what is wrong; or `datasets` has the rows
        return None
    return f"{commit}:{file}" if file else str(commit)


def open_hub(source: Source, limit: int | None) -> RowFile:
    """Opens a hub id[@REVISION], or one with :FILE. With a limit, at most that many rows are downloaded.

    Raises:
        UserError: a data set that cannot be read, or one without the split or revision; no home directory for its
            cache.
    """
    check_hub_cache()
    import datasets

    (repository, revision), file = parse_source(source.path)
    commit = resolve(HubId(repository, revision), "dataset") if revision else None
    split = source.split or "train"
    options: dict[str, Any] = {"name": source.name, "data_files": file or None, "split": split, "revision": commit}
    try:
        if limit is None:
            # downloaded once, and kept by `datasets`
            rows: Any = datasets.load_dataset(repository, streaming=False, **options)
        else:
            rows = list(islice(datasets.load_dataset(repository, streaming=True, **options), limit))
    except Exception as error:
        # whatever the network, the hub or a broken file makes it raise
        if splits := [] if file else _other_splits(repository, commit, source.name, split):
            message = f"has no split {split}; set split of this source in data.train to one of {', '.join(splits)}"
            raise UserError(message, path=source.path) from None
        raise UserError(f"no such file, and as a hub id it cannot be read ({error})", path=source.path) from None
    if limit is None and commit:
        _check_commit(rows, commit, source.path)

    def sha256() -> str:
        if limit is None:
            return rows._fingerprint
        return hashlib.sha256(repr(rows).encode(errors="surrogatepass")).hexdigest()

    def records() -> Iterator[NumberedRecord]:
        for number, record in enumerate(rows, 1):
            yield number, {name: drop_null_fields(value) for name, value in record.items()}

    return RowFile(source.path, "row", True, sha256, records)


def _check_commit(rows: Any, commit: str, path: str) -> None:
    """Raises UserError: without a network, `datasets` takes the rows that it has, of whatever commit."""
    paths = [file["filename"] for file in getattr(rows, "cache_files", [])]
    if paths and not any(commit in file for file in paths):
        message = f"the hub cannot be reached, and the cache of datasets has rows of another commit than {commit}"
        raise UserError(f"{message}; load it once with a network", path=path)


def _other_splits(repository: str, commit: str | None, name: str | None, split: str) -> list[str]:
    """The splits of a data set that has not the one that was asked for."""
    import datasets

    try:
        splits = [str(found) for found in datasets.get_dataset_split_names(repository, name, revision=commit)]
    except Exception:
        return []
    return [] if split in splits else splits
