"""Receipts: what a file was made from, by SHA-256, so that whatever changed since is found and named.

A receipt is a JSON object whose key `sha256` is the digest of all its other keys. There are three kinds:

- OUTPUT/receipt.jsonl, of a run: a chain of them, one a line; `previous` is the `sha256` of the line before.
- receipt.json in a directory of weights: beside a trained adapter or model, and in what `minorca.export` writes.
- the entry `receipt` of the JSON that `minorca.evaluate --output` writes.

None is signed: who changes a file and writes its receipts anew is not found out by them, but by computing the numbers
again (minorca/replay).
"""

import hashlib
import importlib.metadata
import json
import logging
import platform
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from minorca import __version__
from minorca.errors import UserError
from minorca.files.adapters import adapter_paths
from minorca.files.atomic import sha256, sha256_each
from minorca.files.hub import local_directory
from minorca.files.safe_io import find_file, parse_json, quote, read_json, read_small
from minorca.host import processor_name

log = logging.getLogger(__name__)

# The format of all receipts. A later version may add keys without another number.
FORMAT = 1
CHAIN = "receipt.jsonl"
FILE = "receipt.json"
# of a chain; a line for every checkpoint, which has 19 bytes a step
MAX_CHAIN_BYTES = 2**30
# what the numbers of a run may depend on beside minorca itself
PACKAGES = ("torch", "triton", "numpy", "safetensors")
# hexadecimal digits of the digest of a part, as a line or a score
SHORT = 16


def digest(value: object) -> str:
    """The SHA-256 of a value as JSON, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def short_digest(data: bytes) -> str:
    """The first 64 bits of the SHA-256 of a part of a file."""
    return hashlib.sha256(data).hexdigest()[:SHORT]


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """The receipt of these values."""
    return values | {"sha256": digest(values)}


def is_sealed(receipt: dict[str, Any]) -> bool:
    """Whether a receipt has the values that it was sealed with."""
    return receipt.get("sha256") == digest({key: value for key, value in receipt.items() if key != "sha256"})


def sha256_of(paths: Iterable[Path], root: Path | None = None) -> dict[str, str]:
    """The SHA-256 of files, by name, or by their path below `root`."""
    found = sorted(paths)
    names = (path.relative_to(root).as_posix() if root else path.name for path in found)
    return dict(zip(names, sha256_each(found)))


# ---------------------------------------------------------------------------------------------------- what computed it


@cache
def code_sha256() -> str:
    """The SHA-256 of minorca's own source files and those of its kernels, with their names."""
    import minorca_kernels

    total = hashlib.sha256()
    for package in (Path(__file__).parent, Path(minorca_kernels.__file__).parent):
        for path in sorted(package.rglob("*.py")):
            total.update(f"{path.relative_to(package.parent).as_posix()} {sha256(path)}\n".encode())
    return total.hexdigest()


def versions() -> dict[str, str | None]:
    """Of minorca, its source files, Python, and the packages that its numbers may depend on."""
    found: dict[str, str | None] = {"minorca": __version__, "code": code_sha256(), "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def machine(ranks: int) -> dict[str, str | int]:
    """The device of this process, its threads, and the number of ranks that compute together."""
    import torch

    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{processor_name()}, {torch.backends.cpu.get_cpu_capability()}"
    return {"device": device, "threads": torch.get_num_threads(), "ranks": ranks}


# --------------------------------------------------------------------------------------------------- a chain of lines


class Line(NamedTuple):
    """A line of a chain: its receipt, and the line as it is in the file."""

    values: dict[str, Any]
    raw: bytes


def make_line(values: dict[str, Any], previous: str | None) -> Line:
    """The line of these values that follows one with the digest `previous`; None: the first."""
    receipt = sealed(values | {"previous": previous})
    return Line(receipt, _raw(receipt))


def _raw(receipt: dict[str, Any]) -> bytes:
    return (json.dumps(receipt) + "\n").encode()


def read_lines(path: Path) -> tuple[list[Line], UserError | None]:
    """The lines of a chain up to the first that is not as it was written, and what is wrong with that one.

    The beginning of a line at the end is none: a run was stopped within it, or is writing it.
    """
    lines: list[Line] = []
    content = read_small(path, MAX_CHAIN_BYTES)
    for n, raw in enumerate(content[: content.rfind(b"\n") + 1].splitlines(keepends=True), 1):
        receipt = _parse(raw)
        wrong = _problem(receipt, raw, lines)
        if receipt is None or wrong:
            return lines, UserError(wrong or "is not a line of a receipt", path=path, where=f"line {n}")
        lines.append(Line(receipt, raw))
    return lines, None


def _parse(raw: bytes) -> dict[str, Any] | None:
    """None where it is no line of a receipt."""
    try:
        values = parse_json(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or values.get("kind") not in KINDS:
        return None
    expected = {"format": int, "step": int, "sha256": str} | KINDS[values["kind"]]
    has_types = all(type(values.get(key)) is kind for key, kind in expected.items())
    return values if has_types and "previous" in values else None


def _problem(receipt: dict[str, Any] | None, raw: bytes, before: list[Line]) -> str | None:
    """What is wrong with a line that follows those before."""
    if receipt is None:
        return "is not a line of a receipt"
    if receipt["format"] != FORMAT:
        return f"has format {quote(receipt['format'])}; this version of minorca reads format {FORMAT}"
    if not is_sealed(receipt) or raw != _raw(receipt):
        return "was changed: its sha256 is not that of its other keys"
    if not before and receipt["previous"] is not None:
        return "is not the first line of a receipt: lines before it were removed"
    if before and receipt["previous"] != before[-1].values["sha256"]:
        return "does not follow the line before: one there was removed, added, moved or changed"
    return None


# the kinds of lines, and the types of what they have
_DIGESTS = {"files": dict, "metrics": dict}
_STATE = {"settings": dict, "identity": dict, "renderer": int, "versions": dict, "machine": dict}
KINDS = {
    "start": _STATE | {"rows": dict},
    "resume": _STATE,
    "checkpoint": _DIGESTS,
    "outcome": _DIGESTS | {"name": str},
}


# ------------------------------------------------------------------------------------------------ directories, scores


def sha256_in(directory: Path) -> dict[str, str]:
    """The SHA-256 of every file of a directory, its receipt left out, by path."""
    return sha256_of((path for path in directory.rglob("*") if path.is_file() and path.name != FILE), directory)


def write_receipt(directory: Path, values: dict[str, Any], files: dict[str, str] | None = None) -> None:
    """Writes receipt.json of a directory.

    Args:
        values: what it says beside the SHA-256 of every file.
        files: these, where they are known.
    """
    files = sha256_in(directory) if files is None else files
    receipt = sealed({"format": FORMAT, **values, "files": files})
    (directory / FILE).write_text(json.dumps(receipt, indent=2) + "\n")


def read_receipt(directory: Path) -> dict[str, Any] | None:
    """What receipt.json in a directory says; None without one.

    Raises:
        UserError: it is invalid, or was changed.
    """
    path = find_file(directory, FILE)
    if path is None:
        return None
    receipt = read_json(path)
    if receipt.get("format") != FORMAT or not isinstance(receipt.get("files"), dict):
        raise UserError(f"is no receipt of format {FORMAT}", path=path)
    if not is_sealed(receipt):
        raise UserError("was changed: its sha256 is not that of its other keys", path=path)
    return receipt


def of_weights(paths: Sequence[Path], adapters: Iterable[str | Path]) -> dict[str, Any]:
    """What is made of a model's weight files and adapters: their digests, and the receipts beside them."""
    base = {"base": sha256_of(paths), "base_receipt": _receipt_beside(paths[0].parent)}
    return base | of_adapters(adapters)


def of_adapters(adapters: Iterable[str | Path]) -> dict[str, Any]:
    """What is made of adapters alone, as `of_weights`."""
    described = [
        {"files": sha256_of(adapter_paths(adapter)), "receipt": _receipt_beside(local_directory(adapter))}
        for adapter in adapters
    ]
    return {"minorca": __version__, "code": code_sha256(), "adapters": described}


def _receipt_beside(directory: Path) -> dict[str, Any] | None:
    """As `read_receipt`; None for one that is invalid, or another tool's, which is logged."""
    try:
        return read_receipt(directory)
    except UserError as error:
        log.warning("%s; left out", error)
        return None


def as_metadata(values: dict[str, Any]) -> dict[str, str]:
    """What a file of weights, such as GGUF, carries in its metadata: the receipt of `values`, as JSON."""
    return {"minorca.version": __version__, "minorca.receipt": json.dumps(sealed({"format": FORMAT, **values}))}


# of an evaluation's JSON, where every score has a digest of its own
SCORES = ("results", "groups", "suites")


def of_scores(written: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The receipt of an evaluation: `values`, what it was computed with, and the digest of every score and of
    everything else in `written`.
    """
    return sealed({"format": FORMAT, **values, "versions": versions(), "scores": score_digests(written)})


def score_digests(written: dict[str, Any]) -> dict[str, str]:
    """Digests of an evaluation's JSON, its receipt left out: of each score by its path, as `results/answers/acc,none`,
    of all else by its first key.
    """
    found: dict[str, str] = {}

    def add(path: str, value: object, depth: int) -> None:
        if depth and isinstance(value, dict) and value:
            for key, inner in value.items():
                add(f"{path}/{key}", inner, depth - 1)
        else:
            found[path] = digest(value)[:SHORT]

    for key, value in written.items():
        if key != "receipt":
            add(key, value, 2 if key in SCORES else 0)
    return found
