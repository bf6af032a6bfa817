"""Reads the rows of hub data sets, by way of `datasets`."""

import hashlib
from collections.abc import Iterator
from itertools import islice
from typing import Any

from minorca.config import Source
from minorca.data.row_files import NumberedRecord, RowFile, drop_null_fields
from minorca.errors import UserError
from minorca.files.safe_io import check_hub_cache


def open_hub(source: Source, limit: int | None) -> RowFile:
    """Opens a hub id, or hub-id:FILE. With a limit, at most that many rows are downloaded.

    Raises:
        UserError: a data set that cannot be read, or one without the split; no home directory for its cache.
    """
    check_hub_cache()
    import datasets

    repository, _, file = source.path.partition(":")
    split = source.split or "train"
    options: dict[str, Any] = {"name": source.name, "data_files": file or None, "split": split}
    try:
        if limit is None:
            # Downloaded once, and kept by `datasets`.
            rows: Any = datasets.load_dataset(repository, streaming=False, **options)
        else:
            rows = list(islice(datasets.load_dataset(repository, streaming=True, **options), limit))
    except Exception as error:
        # whatever the network, the hub or a broken file makes it raise
        if splits := _other_splits(source, split):
            message = f"has no split {split}; set split of this source in data.train to one of {', '.join(splits)}"
            raise UserError(message, path=source.path) from None
        raise UserError(f"no such file, and as a hub id it cannot be read ({error})", path=source.path) from None

    def sha256() -> str:
        if limit is None:
            return rows._fingerprint
        return hashlib.sha256(repr(rows).encode(errors="surrogatepass")).hexdigest()

    def records() -> Iterator[NumberedRecord]:
        for number, record in enumerate(rows, 1):
            yield number, {name: drop_null_fields(value) for name, value in record.items()}

    return RowFile(source.path, "row", True, sha256, records)


def _other_splits(source: Source, split: str) -> list[str]:
    """The splits of a data set that has not the one that was asked for."""
    import datasets

    # Named files make one split, train.
    if ":" in source.path:
        return []
    try:
        splits = [str(name) for name in datasets.get_dataset_split_names(source.path, source.name)]
    except Exception:
        return []
    return [] if split in splits else splits
