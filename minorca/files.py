"""Files that are complete or absent and are known by their hash, and files of a directory that anybody may have made."""

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
        raise UserError(f"{directory}: cannot be written ({error}); nothing half-written was left") from None
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
    try:
        expected = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{manifest}: cannot be read ({error})") from None
    names = {path.name for path in directory.iterdir()} - {MANIFEST}
    if not isinstance(expected, dict) or names != expected.keys():
        listed = set(expected) if isinstance(expected, dict) else set()
        wrong = f"names {sorted(listed - names)}, which are not there, and lacks {sorted(names - listed)}, which are"
        raise UserError(f"{manifest}: {wrong}")
    for name in sorted(names):
        path = inside(directory, name)
        found = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        if found != expected[name]:
            raise UserError(f"{path}: is not what was saved (expected {expected[name]}, found {found})")


def inside(directory: Path, name: str) -> Path:
    """The path of a file in a directory that anybody may have made: a plain name, and no link that leads out of there, but into
    the blobs of the Hugging Face cache it belongs to (models--X/snapshots/REVISION/FILE -> models--X/blobs/HASH). It may not exist.

    Raises:
        UserError: naming the file and where it leads.
    """
    if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", "..") or "\0" in name:
        raise UserError(f"{directory}: {name!r} is no name of a file in it; expected one without directories")
    home, real = directory.resolve(), (directory / name).resolve()
    cache = home.parent.parent
    homes = [home, cache / "blobs"] if home.parent.name == "snapshots" and cache.name.startswith("models--") else [home]
    if not any(real.is_relative_to(one) for one in homes):
        raise UserError(f"{directory / name}: is a link to {real}, outside its directory, which is not followed; copy the file there")
    return directory / name


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
        raise UserError(f"{path}: cannot be locked ({error})") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
