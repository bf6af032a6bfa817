"""Files and directories that appear complete or not at all, are verified by checksums, and have a single writer."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError

from minorca.errors import UserError, disk_reason
from minorca.files.safe_io import find_file, quote, read_json
from minorca.progress import progress_bar

MANIFEST = "MANIFEST.json"


def sha256(path: Path, hashed: Callable[[int], object] = lambda count: None) -> str:
    """The SHA-256 of a file's content, in hexadecimal; `hashed` is told of every block how many bytes it has."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(2**20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            hashed(count)
    return digest.hexdigest()


def sha256_each(paths: Sequence[Path], what: str = "reading checksums") -> list[str]:
    """The SHA-256 of each file; of a large model they are many, so each core reads one."""
    size = sum(path.stat().st_size for path in paths)
    with ThreadPoolExecutor() as pool, progress_bar(what, size, "B") as bar:
        return list(pool.map(lambda path: sha256(path, bar.update), paths))


def sync(path: Path) -> None:
    """Waits until a file's content, or a directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_path(path: Path, owner: str = "") -> Path:
    """A new name beside a path, for what is not complete.

    owner: begins its random part, by which the owner finds what is left of it when it was killed.
    """
    return path.with_name(f"{path.name}.tmp-{owner}{uuid.uuid4().hex}")


def publish(directory: Path, write: Callable[[Path], None], owner: str = "") -> None:
    """Creates a directory atomically: `write(temporary)` fills it, then it is synchronised to disk and renamed.

    owner: as of `temporary_path`.

    Raises:
        UserError: it cannot be written (disk full, no permission); the temporary directory is removed.
    """
    temporary = temporary_path(directory, owner)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        for path in temporary.rglob("*"):
            sync(path)
        sync(temporary)
        temporary.rename(directory)
        sync(directory.parent)
    except (OSError, SafetensorError) as error:
        reason = disk_reason(error, directory)
        raise UserError(f"cannot be written ({reason}); nothing half-written was left", path=directory) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_unfinished(directory: Path, names: Collection[str]) -> None:
    """Removes what killed calls of `publish` have left of a directory, and the directory itself, which is damaged.

    Args:
        names: the files that it may have.

    Raises:
        UserError: it has another file.
    """
    own = re.compile(re.escape(directory.name) + r"\.tmp-[0-9a-f]{32}")
    leftovers = (path for path in directory.parent.glob(f"{directory.name}.tmp-*") if own.fullmatch(path.name))
    for path in (*leftovers, directory):
        if path.is_dir():
            if foreign := sorted({entry.name for entry in path.iterdir()} - set(names)):
                state = "is damaged" if path == directory else "was not finished"
                raise UserError(f"{state}, and holds {foreign[0]}, which is none of its files; move it away", path=path)
            shutil.rmtree(path, ignore_errors=True)


def _is_device(path: Path) -> bool:
    """Whether a path, or what it links to, is written to as it is: a device, a pipe, or a file that is already open, as
    /dev/stdout.
    """
    if path.parent in (Path("/dev/fd"), Path("/proc/self/fd")) or path in (Path("/dev/stdout"), Path("/dev/stderr")):
        return True
    if path.is_symlink() and path.exists():
        return _is_device(path.parent / path.readlink())
    return path.exists() and not path.is_file()


def check_output(path: Path, marker: str, beside: Sequence[Path] = ()) -> None:
    """Creates the directory of a file that is to be written later.

    Args:
        marker: text that the file will have; one without it is not replaced.
        beside: files that are written with it. They replace others of these names only where it does so itself.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot be made ({error}); choose another --output", path=path.parent) from None
    places = [path] if _is_device(path) else [path, path.parent]
    if path.is_dir() or not all(os.access(place, os.W_OK) for place in places if place.exists()):
        raise UserError("is not a file that can be written; choose another --output", path=path)
    # what standard output leads to is appended to
    is_replaced = path.is_file() and not _is_device(path)
    if is_replaced and (content := path.read_bytes()) and marker.encode() not in content:
        raise UserError("exists, and this command has not written it; choose another --output", path=path)
    for other in beside:
        if other.exists() and not path.exists():
            raise UserError(f"exists, and would be written with {path.name}; choose another --output", path=other)


def write_file(path: Path, content: str | bytes, owner: str = "") -> None:
    """Writes a file, text in UTF-8, in place of what was there, once it is on the disk; a device, such as /dev/stdout,
    is written to.

    owner: as of `temporary_path`.

    Raises:
        UserError: it cannot be written; a file that was there is still there.
    """
    data = content.encode() if isinstance(content, str) else content
    # a link is not replaced, but what it leads to
    target = path.resolve()
    temporary = temporary_path(target, owner)
    try:
        if _is_device(path):
            # what was printed before comes first where both lead to one file
            sys.stdout.flush()
            with path.open("ab") as stream:
                stream.write(data)
            return
        temporary.write_bytes(data)
        sync(temporary)
        temporary.replace(target)
    except OSError as error:
        raise UserError(f"cannot be written ({disk_reason(error, path)})", path=path) from None
    finally:
        # a name may be too long
        with contextlib.suppress(OSError):
            temporary.unlink()


def create_file(path: Path, content: str) -> None:
    """Writes a new file, in UTF-8: complete or absent, and never in place of another.

    Raises:
        UserError: there is one, or it cannot be written.
    """
    temporary = temporary_path(path)
    try:
        temporary.write_text(content, encoding="utf-8")
        sync(temporary)
        # unlike a renaming, it fails where there is a file
        os.link(temporary, path)
    except FileExistsError:
        raise UserError("exists, and is not replaced; choose another name", path=path) from None
    except OSError as error:
        raise UserError(f"cannot be written ({disk_reason(error, path)})", path=path) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_files(directory: Path, files: dict[str, bytes]) -> None:
    """Writes files into an existing directory."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def write_manifest(directory: Path) -> None:
    """Writes the size and SHA-256 of every file in a directory; to be called after all other files are written."""
    files = {path.name: found for path, found in _describe(sorted(directory.iterdir()))}
    (directory / MANIFEST).write_text(json.dumps(files, indent=2) + "\n")


def _describe(paths: list[Path]) -> Iterator[tuple[Path, dict]]:
    """The size and SHA-256 of each file."""
    for path, digest in zip(paths, sha256_each(paths)):
        yield path, {"bytes": path.stat().st_size, "sha256": digest}


def manifest_digests(directory: Path) -> dict[str, str]:
    """The SHA-256 of each file, as a directory's manifest has it."""
    return {name: about["sha256"] for name, about in read_json(directory / MANIFEST).items()}


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


def is_lock(path: Path) -> bool:
    """Whether a file is what `lock` makes; it may have just begun to write it."""
    return path.is_file() and re.fullmatch(r"(process \d+ on \S+\n)?", path.read_text(errors="replace")) is not None
