"""Files that are complete or absent, are known by their hash, and have one writer."""

import fcntl
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from minorca.errors import UserError
from minorca.files.safe_io import find_file, quote, read_json

MANIFEST = "MANIFEST.json"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(directory: Path, write: Callable[[Path], None]) -> None:
    """Makes a directory appear complete or not at all: `write(temporary)`, synchronise to disk, rename.

    Raises:
        UserError: it cannot be written (no room, no permission); nothing of it is left.
    """
    temporary = directory.with_name(f"{directory.name}.tmp-{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        for path in temporary.iterdir():
            _sync(path)
        _sync(temporary)
        temporary.rename(directory)
        _sync(directory.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot be written ({error}); nothing half-written was left", path=directory) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_manifest(directory: Path) -> None:
    """Writes, last of a directory's files, every other one's size and SHA-256."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(directory.iterdir())}
    (directory / MANIFEST).write_text(json.dumps(files, indent=2) + "\n")


def verify_manifest(directory: Path) -> None:
    """Checks a directory's files against its manifest.

    Raises:
        UserError: naming the file that is missing, surplus, or not what was written, with what was expected and found.
    """
    manifest = directory / MANIFEST
    expected = read_json(manifest)
    names = {path.name for path in directory.iterdir()} - {MANIFEST}
    if names != expected.keys():
        missing, surplus = sorted(expected.keys() - names), sorted(names - expected.keys())
        raise UserError(
            f"names {quote(missing)}, which are not there, and lacks {quote(surplus)}, which are", path=manifest
        )
    for name in sorted(names):
        path = find_file(directory, name)
        if path is None:
            raise UserError("is a link to nothing", path=directory / name)
        found = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        if found != expected[name]:
            raise UserError(f"is not what was saved (expected {quote(expected[name])}, found {found})", path=path)


def lock(path: Path):
    """An open file that holds a lock until it is closed or the process ends, however it ends; None where another process holds it.
    The file names the holder."""
    try:
        file = path.open("a+")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError as error:
        raise UserError(f"cannot be locked ({error})", path=path) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
