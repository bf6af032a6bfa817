"""How people's files are written: by the standard library, pandas, pyarrow and datasets."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pandas
import pyarrow

datasets.disable_progress_bars()


def jsonl(*records) -> bytes:
    """Text instead of a record is a line as it is."""
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    return "".join(line + "\n" for line in lines).encode()


def array(*records) -> bytes:
    """A JSON array with a record a line, from line 2 on."""
    return ("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n").encode()


def table(*records, delimiter: str = ",") -> bytes:
    """CSV or TSV; a cell that is neither text nor empty holds JSON."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(records[0]), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in record.items()})
    return file.getvalue().encode()


def tsv(*records) -> bytes:
    return table(*records, delimiter="\t")


def gz(content: bytes) -> bytes:
    return gzip.compress(content)


def zst(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


def parquet(*records) -> Callable[[Path], object]:
    return lambda path: pandas.DataFrame(records).to_parquet(path)


def arrow_file(*records) -> Callable[[Path], object]:
    return lambda path: _write_arrow(path, records, pyarrow.ipc.new_file)


def arrow_stream(*records) -> Callable[[Path], object]:
    return lambda path: _write_arrow(path, records, pyarrow.ipc.new_stream)


def _write_arrow(path: Path, records, new: Callable) -> None:
    content = pyarrow.Table.from_pylist(list(records))
    with new(str(path), content.schema) as writer:
        writer.write_table(content)


def saved(*records) -> Callable[[Path], object]:
    """The directory of `Dataset.save_to_disk`."""
    return lambda path: datasets.Dataset.from_list(list(records)).save_to_disk(str(path))


def saved_splits(**splits: list) -> Callable[[Path], object]:
    """The directory of `DatasetDict.save_to_disk`."""
    content = datasets.DatasetDict()
    for name, records in splits.items():
        content[name] = datasets.Dataset.from_list(records)
    return lambda path: content.save_to_disk(str(path))
