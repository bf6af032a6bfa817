"""Files and directories that appear complete or not at all, are verified by checksums, and have a single writer."""

import fcntl
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError

from minorca.errors import UserError, disk_reason
from minorca.files.safe_io import find_file, quote, read_json

MANIFEST = "MANIFEST.json"


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(directory: Path, write: Callable[[Path], None]) -> None:
    """Creates a directory atomically: `write(temporary)` fills it, then it is synchronised to disk and renamed.

    Raises:
        UserError: it cannot be written (disk full, no permission); the temporary directory is removed.
    """
    temporary = directory.with_name(f"{directory.name}.tmp-{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        for path in temporary.rglob("*"):
            _sync(path)
        _sync(temporary)
        temporary.rename(directory)
        _sync(directory.parent)
    except (OSError, SafetensorError) as error:
        reason = disk_reason(error, directory)
        raise UserError(f"cannot be written ({reason}); nothing half-written was left", path=directory) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_output(path: Path, beside: Sequence[Path] = ()) -> None:
    """Creates the directory of a file that is to be written later.

    Args:
        beside: files that are written with it. They replace others of these names only where it does so itself.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot be made ({error}); choose another --output", path=path.parent) from None
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError("is not a file that can be written; choose another --output", path=path)
    for other in beside:
        if other.exists() and not path.exists():
            raise UserError(f"exists, and would be written with {path.name}; choose another --output", path=other)


def write_file(path: Path, content: str | bytes) -> None:
    """Writes a file, text in UTF-8, in place of what was there.

    Raises:
        UserError: it cannot be written; what was there is still there.
    """
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot be written ({disk_reason(error, path)})", path=path) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_manifest(directory: Path) -> None:
    """Writes the size and SHA-256 of every file in a directory; to be called after all other files are written."""
    files = {path.name: found for path, found in _describe(sorted(directory.iterdir()))}
    (directory / MANIFEST).write_text(json.dumps(files, indent=2) + "\n")


def _describe(paths: list[Path]) -> Iterator[tuple[Path, dict]]:
    """The size and SHA-256 of each file; of a large model they are many, so each core reads one."""
    with ThreadPoolExecutor() as pool:
        for path, digest in zip(paths, pool.map(sha256, paths)):
            yield path, {"bytes": path.stat().st_size, "sha256": digest}


def verify_manifest(directory: Path) -> None:
    """Checks a directory's files against its manifest.

    Raises:
        UserError: missing or unexpected files, or a file whose size or checksum differs, with both values.
    """
    manifest = directory / MANIFEST
    expected = read_json(manifest)
    names = {path.name for path in directory.iterdir()} - {MANIFEST}
    differences = {"missing files": expected.keys() - names, "unexpected files": names - expected.keys()}
    if any(differences.values()):
        listed = [f"{kind}: {quote(sorted(files))}" for kind, files in differences.items() if files]
        raise UserError("; ".join(listed), path=manifest)
    paths = {name: find_file(directory, name) for name in sorted(names)}
    if broken := next((name for name, path in paths.items() if path is None), None):
        raise UserError("broken symbolic link", path=directory / broken)
    for (path, found), name in zip(_describe([path for path in paths.values() if path]), paths):
        if found != expected[name]:
            raise UserError(f"does not match the manifest (expected {quote(expected[name])}, got {found})", path=path)


def lock(path: Path) -> TextIO | None:
    """Takes an exclusive lock without waiting, and writes the holder's process id and host to the file.

    Returns:
        The open file, which holds the lock until it is closed or the process ends, however it ends; None if another
        process holds the lock.

    Raises:
        UserError: the file cannot be opened or locked.
    """
    try:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        file.truncate(0)
        # without a buffer, which a full disk would let no one close
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except OSError as error:
        raise UserError(f"cannot be locked ({disk_reason(error, path)})", path=path) from None
    return file
