"""Rows of conversations from files and hubs, in six formats. Every complaint names the file and the line or row.

openorca            id (may be missing), system_prompt, question, response; other columns are counted and not used
sharegpt            conversations: [{from: system | human | user | gpt | assistant | chatgpt, value, weight (may be missing)}]
messages            messages: [{role: system | user | assistant, content, weight (may be missing)}]
alpaca              instruction, input (after the instruction and a blank line; may be missing), output, system (may be missing)
prompt_completion   prompt, completion: both text, or both lists of messages, of which the prompt's are not trained
text                text, which is written as it stands, without a template

A message's weight is 0 or 1; an answer of weight 0 is not in the loss. On other messages it says nothing: under
`data.train_on: response` answers alone are trained, and under `all` everything is.
"""

import csv
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from minorca.config import Source
from minorca.errors import UserError
from minorca.files.atomic import sha256
from minorca.files.safe_io import parse_json

AN_ARRAY = (
    "expected an object with columns, found list; make one object a line of a JSON array: jq -c '.[]' FILE > FILE.jsonl"
)
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES = ROLES | {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}


class Records(NamedTuple):
    """A source opened: its columns as they are."""

    path: str
    unit: str  # what the numbers count: lines of a file, or rows
    sha256: Callable[[], str]  # of the content
    numbered: Callable[[], Iterator[tuple[int, dict]]]


class Row(NamedTuple):
    path: str
    unit: str
    number: int
    content: (
        list[dict] | str
    )  # messages {"role", "content"}, with "weight": 0 on an answer that is not trained; or plain text

    @property
    def where(self) -> str:
        return f"{self.path}, {self.unit} {self.number}"


def read_rows(records: Records, format: str, limit: int | None, counts: Counter) -> Iterator[Row]:
    """The rows of at most `limit` records; `counts` gets how many were read, and what was passed over or changed in them.

    Raises:
        UserError: a file that is broken, a missing column, a value that is not of its format.
    """
    convert, needed, optional = FORMATS[format]
    seen: dict[int, int] = {}
    for number, record in islice(records.numbered(), limit):
        counts["read"] += 1
        try:
            if missing := [column for column in needed if column not in record]:
                found = ", ".join(map(str, record))
                wants = f"format {format} needs {', '.join(needed)}"
                raise UserError(f"no column {missing[0]}; {wants}, found {found}; mend the row or data.format")
            counts.update(
                f"with the unused column {column}"
                for column in record
                if column not in needed and column not in optional
            )
            content = convert(record, counts)
        except UserError as error:
            raise UserError(f"{records.path}, {records.unit} {number}: {error}") from None
        if format == "openorca" and record.get("id") not in (None, "") and _repeated(record, seen, counts):
            continue
        yield Row(records.path, records.unit, number, content)


def _repeated(record: dict, seen: dict[int, int], counts: Counter) -> bool:
    """Whether a row with this id and these texts was seen before: copies of OpenOrca have some twice.

    seen: of each id the row that had it first, and every other row that had one of them, all as hashes: there are millions.
    """
    texts = record["system_prompt"], record["question"], record["response"]
    same_id, same_row = (
        int.from_bytes(hashlib.blake2b(repr(values).encode(errors="surrogatepass"), digest_size=8).digest())
        for values in (record["id"], (record["id"], *texts))
    )
    if same_id not in seen:
        seen[same_id] = same_row
        return False
    if seen[same_id] == same_row or same_row in seen:
        counts["dropped: repeated"] += 1
        return True
    counts["with the id of another row"] += 1
    seen[same_row] = same_row
    return False


# -------------------------------------------------------------------------------------------------- a record -> messages


def _openorca(record: dict, counts: Counter) -> list[dict]:
    return _conversation(
        _straight(_text(record, "system_prompt"), counts), _text(record, "question"), _text(record, "response")
    )


def _sharegpt(record: dict, counts: Counter) -> list[dict]:
    messages = _messages(record, "conversations", "from", "value", SHAREGPT_ROLES, counts)
    for message in messages:
        if message["role"] == "system":
            message["content"] = _straight(message["content"], counts)
    return messages


def _chat(record: dict, counts: Counter) -> list[dict]:
    return _messages(record, "messages", "role", "content", ROLES, counts)


def _alpaca(record: dict, counts: Counter) -> list[dict]:
    question = "\n\n".join(filter(None, [_text(record, "instruction"), _text(record, "input")]))
    return _conversation(_text(record, "system"), question, _text(record, "output"))


def _prompt_completion(record: dict, counts: Counter) -> list[dict]:
    lists = [isinstance(record[column], list) for column in ("prompt", "completion")]
    if not any(lists):
        return _conversation("", _text(record, "prompt"), _text(record, "completion"))
    if not all(lists):
        kinds = " and ".join(_kind(record[column]) for column in ("prompt", "completion"))
        raise UserError(f"prompt and completion are {kinds}; expected both text or both lists of messages")
    prompt, completion = (
        _messages(record, column, "role", "content", ROLES, counts) for column in ("prompt", "completion")
    )
    return [m | {"weight": 0} if m["role"] == "assistant" else m for m in prompt] + completion


def _plain(record: dict, counts: Counter) -> str:
    return _text(record, "text")


FORMATS = {  # of each: what makes messages of a record, the columns it needs, and those it may have
    "openorca": (_openorca, ("system_prompt", "question", "response"), ("id",)),
    "sharegpt": (_sharegpt, ("conversations",), ()),
    "messages": (_chat, ("messages",), ()),
    "alpaca": (_alpaca, ("instruction", "output"), ("input", "system")),
    "prompt_completion": (_prompt_completion, ("prompt", "completion"), ()),
    "text": (_plain, ("text",), ()),
}


def _conversation(system: str, question: str, answer: str) -> list[dict]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [{"role": "system", "content": system}, *messages] if system else messages


def _messages(
    record: dict, column: str, role_key: str, text_key: str, roles: dict[str, str], counts: Counter
) -> list[dict]:
    turns, expected = record[column], f"{{{role_key}, {text_key}}}"
    if not isinstance(turns, list):
        hint = "; a CSV cell holds no list: use JSONL or parquet" if isinstance(turns, str) else ""
        raise UserError(f"{column} is {_kind(turns)}; expected a list of {expected}{hint}")
    messages = []
    for i, turn in enumerate(turns):
        place = f"{column}[{i}]"
        if not isinstance(turn, dict) or not {role_key, text_key} <= turn.keys():
            found = f"has {', '.join(map(str, turn)) or 'nothing'}" if isinstance(turn, dict) else f"is {_kind(turn)}"
            raise UserError(f"{place} {found}; expected {expected}")
        role, weight = turn[role_key], turn.get("weight")
        if not isinstance(role, str) or role not in roles:
            raise UserError(f"{place}.{role_key} is {role!r:.60}; expected one of {', '.join(roles)}")
        if weight is not None and (type(weight) not in (int, float) or weight not in (0, 1)):
            raise UserError(f"{place}.weight is {weight!r:.60}; expected 0 or 1")
        message = {"role": roles[role], "content": _checked(turn[text_key], f"{place}.{text_key}")}
        messages.append(message | {"weight": 0} if weight == 0 and message["role"] == "assistant" else message)
        others = [key for key, value in turn.items() if key not in (role_key, text_key, "weight") and value is not None]
        counts.update(f"messages with the unused key {key}" for key in others)
    return messages


def _text(record: dict, column: str) -> str:
    value = record.get(column)
    return "" if value is None else _checked(value, column)


def _checked(text, name: str) -> str:
    if not isinstance(text, str):
        raise UserError(f"{name} is {_kind(text)}; expected text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{name} holds bytes that are no UTF-8, or half of a surrogate pair; mend or remove the row"
        ) from None
    return text


def _straight(system: str, counts: Counter) -> str:
    """OpenOrca and its descendants spell their sixteen system prompts both ways."""
    counts["system prompts with ’ read as '"] += "’" in system
    return system.replace("’", "'")


def _kind(value) -> str:
    return "null" if value is None else "text" if isinstance(value, str) else type(value).__name__


# -------------------------------------------------------------------------------------------------------- files and hubs


def open_source(source: Source, limit: int | None) -> Records:
    """A .parquet, .jsonl or .csv file, a hub id, or hub-id:FILE; where there is a limit, at most so many rows of a hub are fetched.

    Raises:
        UserError: no such file, a name of another kind, a hub that cannot be read.
    """
    name, path = source.path, Path(source.path).expanduser()
    if path.is_file():
        readers = dict(zip(SUFFIXES, (_jsonl, _jsonl, _csv, _parquet)))
        if path.suffix not in readers:
            raise UserError(f"expected a name ending in {', '.join(readers)}", path=path)
        unit = "row" if path.suffix == ".parquet" else "line"
        return Records(str(path), unit, lambda: _content(path), lambda: readers[path.suffix](path))
    if path.exists() or path.suffix in SUFFIXES and ":" not in name or name.startswith((".", "/", "~")):
        raise UserError("no such file; data.train and data.eval take a file or a hub id", path=name)
    return _hub(name, limit)


def _content(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise UserError(f"cannot be read ({error})", path=path) from None


def _jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    try:
        # bytes that are no UTF-8 come through, for `read_rows` to say in which line they are
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    record = parse_json(line)
                except json.JSONDecodeError as error:
                    if number == 1 and line.lstrip().startswith("["):
                        raise UserError(f"{AN_ARRAY}", path=path, where="line 1") from None
                    raise UserError(
                        f"not valid JSON ({error.msg}, column {error.colno})", path=path, where=f"line {number}"
                    ) from None
                except (ValueError, RecursionError) as error:  # a key given twice; numbers and brackets without end
                    raise UserError(f"cannot be read ({error})", path=path, where=f"line {number}") from None
                if not isinstance(record, dict):
                    found = f"expected an object with columns, found {_kind(record)}"
                    raise UserError(
                        f"{AN_ARRAY if isinstance(record, list) else found}", path=path, where=f"line {number}"
                    )
                yield number, record
    except OSError as error:
        raise UserError(f"cannot be read ({error})", path=path) from None


def _check_names(names: list[str], where) -> None:
    if len(set(names)) < len(names):  # a record would have one of the two, silently
        raise UserError(
            f"names the column {Counter(names).most_common(1)[0][0]} twice; rename or remove one", path=where
        )


def _csv(path: Path) -> Iterator[tuple[int, dict]]:
    csv.field_size_limit(sys.maxsize)  # answers can be longer than the 128 KiB the module allows
    line = 1  # where a row starts: its cells may hold lines
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            _check_names(header, f"{path}, line 1")
            line = reader.line_num + 1
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise UserError(
                        f"found {len(cells)} cells; the header has {len(header)}", path=path, where=f"line {line}"
                    )
                if cells:
                    yield line, dict(zip(header, cells))
                line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"not valid CSV ({error}) in the row that starts here", path=path, where=f"line {line}"
        ) from None
    except OSError as error:
        raise UserError(f"cannot be read ({error})", path=path) from None


def _parquet(path: Path) -> Iterator[tuple[int, dict]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        file, number = ParquetFile(path), 0
        _check_names(file.schema_arrow.names, path)
        for batch in file.iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                number += 1
                yield number, record
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # bytes that are no UTF-8 are a ValueError
        raise UserError(f"cannot be read as parquet ({error})", path=path) from None


def _hub(source: str, limit: int | None) -> Records:
    import datasets

    name, _, file = source.partition(":")
    try:
        # a few rows are streamed, and kept here; all of them are downloaded once, and kept by `datasets`
        rows = datasets.load_dataset(name, data_files=file or None, split="train", streaming=limit is not None)
        rows = rows if limit is None else list(islice(rows, limit))
    except Exception as error:  # whatever the network, the hub or a broken file makes it raise
        raise UserError(f"no such file, and as a hub id it cannot be read ({error})", path=source) from None

    def content() -> str:
        return (
            rows._fingerprint
            if limit is None
            else hashlib.sha256(repr(rows).encode(errors="surrogatepass")).hexdigest()
        )

    return Records(source, "row", content, lambda: enumerate(rows, 1))
