"""Reading of untrusted files: which paths are followed, how large a file may be, strict JSON, values in messages."""

import json
import math
import os
import reprlib
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from minorca.errors import UserError

# An index of 91,000 tensors has 9 million bytes. As Python objects, a JSON file can take 60 times its size.
MAX_JSON_BYTES = 20 * 10**6

_short_repr = reprlib.Repr()
_short_repr.maxstring = 200
_short_repr.maxother = 200


def quote(value) -> str:
    """`repr` of an untrusted value for a message, truncated where it is long or deeply nested."""
    return _short_repr.repr(value)


def user_path(name: str | Path) -> Path:
    """A path as users write it: ~ and ~NAME are home directories, where these are known."""
    return Path(os.path.expanduser(name))


def cache_directory(kind: str, instead: str | None = None) -> Path:
    """Where files of a kind are kept that can be made again, by default in ~/.cache.

    Args:
        instead: another setting that chooses the directory, for the error.

    Raises:
        UserError: nobody says where the home directory is, as for a container's user without an entry in /etc/passwd.
    """
    root = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if root.startswith("~"):
        message = "is not set, and this user has no home directory; set it to a directory"
        raise UserError(message, field="XDG_CACHE_HOME", advice=instead and f"or set {instead}")
    return Path(root, "minorca", kind)


def check_hub_cache() -> None:
    """Raises UserError where the datasets library would find no home directory: it would make one named ~ here."""
    if not os.environ.get("HF_HOME"):
        cache_directory("hub", "HF_HOME")


def find_file(directory: Path, name: str) -> Path | None:
    """A regular file in a directory, or None if there is none.

    `name` must be a plain name without a path. Symbolic links must stay inside the directory, with one exception: in a
    Hugging Face cache they may point to the blobs of the same model (models--X/snapshots/REVISION/FILE ->
    models--X/blobs/HASH).

    Raises:
        UserError: an invalid name, a link that leads elsewhere, or something other than a regular file (opening a pipe
            would block forever).
    """
    is_plain_name = isinstance(name, str) and name.isprintable() and 0 < len(name) < 256
    if not is_plain_name or name != os.path.basename(name) or name in (".", ".."):
        raise UserError(f"invalid file name {quote(name)}; expected a plain name without a path", path=directory)
    path = directory / name
    try:
        home = directory.resolve()
        target = path.resolve()
        allowed = [home]
        # the directory itself, or one in it
        for snapshot in (home, home.parent):
            cache = snapshot.parent.parent
            if snapshot.parent.name == "snapshots" and cache.name.startswith("models--"):
                allowed.append(cache / "blobs")
        if not any(target.is_relative_to(root) for root in allowed):
            raise UserError(
                f"is a symbolic link to {target}, outside its directory, which is not followed; copy the file instead",
                path=path,
            )
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError) as error:
        # RuntimeError: a loop of symbolic links (pathlib before Python 3.13)
        raise UserError(f"cannot be read ({error})", path=path) from None
    if not stat.S_ISREG(mode):
        raise UserError("expected a regular file, got a directory, pipe or device", path=path)
    return path


def find_directory(directory: Path, name: str) -> Path | None:
    """A directory in a directory, or None if there is none, or one that a symbolic link places elsewhere."""
    path = directory / name
    return path if path.is_dir() and path.resolve() == directory.resolve() / name else None


def read_small(path: Path, max_bytes: int) -> bytes:
    """The whole content of a file that `find_file` accepts and that has at most `max_bytes` bytes.

    Raises:
        UserError: a file that is missing, not accepted, too large, or not readable.
    """
    try:
        found = find_file(path.parent, path.name)
        if found is None:
            raise UserError("no such file", path=path)
        size = found.stat().st_size
        if size > max_bytes:
            raise UserError(f"has {size} bytes; expected at most {max_bytes}", path=path)
        return found.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read ({error})", path=path) from None


def parse_json(text: str | bytes):
    """Parses JSON as its standard defines it.

    Raises:
        ValueError: invalid JSON, including what Python accepts: NaN, infinities, and duplicate keys (of which Python
            takes the last value, other parsers the first).
    """
    return json.loads(text, **_STRICT)


def unique_keys(pairs: list[tuple]) -> dict:
    """A JSON object of these. Raises ValueError: two have one key, of which parsers take the first or the last."""
    values = dict(pairs)
    if len(values) < len(pairs):
        duplicate, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"duplicate key {quote(duplicate)}")
    return values


def _finite_number(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number[:40]} is not a valid JSON number")
    return value


_STRICT: dict[str, Any] = {
    "object_pairs_hook": unique_keys,
    "parse_constant": _finite_number,
    "parse_float": _finite_number,
}
# As `parse_json`, without the cost of a new decoder for each text.
JSON_DECODER = json.JSONDecoder(**_STRICT)


def read_json(path: Path) -> dict:
    """Reads a JSON object from a file.

    Raises:
        UserError: as `read_small`; invalid JSON, with the line; another type than an object.
    """
    data = read_small(path, MAX_JSON_BYTES)
    try:
        value = parse_json(data.decode())
    except json.JSONDecodeError as error:
        raise UserError(f"not valid JSON ({error.msg})", path=path, where=f"line {error.lineno}") from None
    except (ValueError, RecursionError) as error:
        # invalid UTF-8, what `parse_json` rejects, integers of too many digits, brackets nested too deeply
        raise UserError(f"cannot be read ({error})", path=path) from None
    if not isinstance(value, dict):
        raise UserError(f"expected a JSON object, got {type(value).__name__}", path=path)
    return value


def read_optional_json(path: Path) -> dict:
    """As `read_json`; an empty object where there is no such file."""
    return read_json(path) if find_file(path.parent, path.name) else {}
