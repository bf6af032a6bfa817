"""Files that anybody may have made: where they may lie, how large they may be, what their JSON may hold, how they are quoted."""

import json
import math
import os
import reprlib
import stat
from pathlib import Path

from minorca.errors import UserError

JSON_BYTES = 20 * 10**6  # an index of 91,000 tensors has 9 million; as Python objects a file may take 60 times as much
_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 200


def quote(value) -> str:
    """A value of a stranger's file in a message: `repr`, cut where it is long or deep."""
    return _shown.repr(value)


def find_file(directory: Path, name: str) -> Path | None:
    """A file in a directory, or None where there is none.

    The name is a plain one, and no link is followed out of there, but into the blobs of the Hugging Face cache that the directory
    belongs to (models--X/snapshots/REVISION/FILE -> models--X/blobs/HASH).

    Raises:
        UserError: a name or a link that leads elsewhere, or something that is no file: reading a pipe would wait for ever.
    """
    if (
        not (isinstance(name, str) and name.isprintable() and 0 < len(name) < 256)
        or name != os.path.basename(name)
        or name in (".", "..")
    ):
        raise UserError(f"{quote(name)} is no name of a file in it; expected one without directories", path=directory)
    path = directory / name
    try:
        home, real = directory.resolve(), path.resolve()
        cache = home.parent.parent
        homes = (
            [home, cache / "blobs"] if home.parent.name == "snapshots" and cache.name.startswith("models--") else [home]
        )
        if not any(real.is_relative_to(one) for one in homes):
            raise UserError(
                f"is a link to {real}, outside its directory, which is not followed; copy the file there", path=path
            )
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError) as error:  # a loop of links
        raise UserError(f"cannot be read ({error})", path=path) from None
    if not stat.S_ISREG(mode):
        raise UserError("expected a file, found a directory, pipe or device", path=path)
    return path


def read_small(path: Path, most: int) -> bytes:
    """All of a file that `find` finds and that has at most `most` bytes.

    Raises:
        UserError: one that is elsewhere, no file, larger, or not to be read.
    """
    try:
        found = find_file(path.parent, path.name)
        if found is None:
            raise UserError("no such file", path=path)
        if (size := found.stat().st_size) > most:
            raise UserError(f"has {size} bytes; expected at most {most}", path=path)
        return found.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read ({error})", path=path) from None


def parse_json(text: str | bytes):
    """JSON as its standard has it: ValueError also for a key that is there twice (Python takes the last, others the first),
    and for NaN and infinities."""

    def unique(pairs: list[tuple]) -> dict:
        values = dict(pairs)
        if len(values) < len(pairs):
            seen = set()
            repeated = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise ValueError(f"the key {quote(repeated)} is there twice")
        return values

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"{number[:40]} is no number of JSON")
        return value

    return json.loads(text, object_pairs_hook=unique, parse_constant=finite, parse_float=finite)


def read_json(path: Path) -> dict:
    """A JSON object from a file, or a `UserError` naming file and line."""
    data = read_small(path, JSON_BYTES)
    try:
        value = parse_json(data.decode())
    except json.JSONDecodeError as error:
        raise UserError(f"not valid JSON ({error.msg})", path=path, where=f"line {error.lineno}") from None
    except (ValueError, RecursionError) as error:  # also bytes that are no text, numbers without end, and brackets
        raise UserError(f"cannot be read ({error})", path=path) from None
    if not isinstance(value, dict):
        raise UserError(f"expected a JSON object, found {type(value).__name__}", path=path)
    return value
