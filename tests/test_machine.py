"""The machine as it is: no home directory, disks without space or inodes, shared memory that cannot be written."""

import errno
import os
import pwd
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from minorca.config import Source
from minorca.data.hub import open_hub
from minorca.errors import UserError, disk_reason
from minorca.evaluate.task_files import load_tasks
from minorca.files.atomic import lock, write_file
from minorca.files.safe_io import cache_directory, user_path
from tests.helpers import ENVIRONMENT, ROOT, wait_until

Disk = namedtuple("Disk", "f_files f_favail")
# as of a container: its own mounts, of which `unshare -m` needs root
MOUNTED = ["unshare", "-m", "bash", "-c"]


@pytest.fixture
def homeless(monkeypatch):
    """A user without an entry in /etc/passwd and without HOME."""

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_a_user_without_a_home(homeless, monkeypatch, tmp_path):
    for kind, instead in (("rows", "data.store"), ("results", "--cache")):
        with pytest.raises(UserError, match=f"^XDG_CACHE_HOME is not set, and .* or set {instead}$"):
            cache_directory(kind, instead)
    # where `datasets` would make a directory named ~
    for load in (lambda: load_tasks(["answers"], ROOT / "examples" / "evaluation"), lambda: open_hub(Source("a/b"), 1)):
        with pytest.raises(UserError, match="^XDG_CACHE_HOME is not set, and .* or set HF_HOME$"):
            load()
    # named as any other path that does not exist
    for path in ("~/model", "~nobody-of-this-name/model"):
        assert user_path(path) == Path(path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory("rows") == tmp_path / "minorca" / "rows"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory("rows") == tmp_path / ".cache" / "minorca" / "rows"
    assert user_path("~/model") == tmp_path / "model"


def test_a_lock_on_a_full_disk(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(os, "write", full)
        with pytest.raises(UserError, match="a.lock: cannot be locked .*No space left on device"):
            lock(tmp_path / "a.lock")
    # it is not held
    file = lock(tmp_path / "a.lock")
    assert file and lock(tmp_path / "a.lock") is None
    assert (tmp_path / "a.lock").read_text().startswith(f"process {os.getpid()} on ")


@pytest.mark.parametrize(
    "disk, said", [(Disk(100, 0), "no inodes left"), (Disk(100, 5), "No space"), (Disk(0, 0), "No")]
)
def test_inodes_that_are_used_up(disk, said, tmp_path, monkeypatch):
    """Some file systems have no fixed number of them, and say 0."""
    error = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "statvfs", lambda path: disk)
    assert said in disk_reason(error, tmp_path / "none" / "yet")
    assert "No such file" in disk_reason(OSError(errno.ENOENT, "No such file"), tmp_path)

    def full(*arguments):
        raise error

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=said):
        write_file(tmp_path / "file", "text")


@pytest.mark.parametrize("gone", ["output", pytest.param("output/tensorboard", marks=pytest.mark.slow)])
def test_an_output_that_is_removed_under_a_run(gone, workplace, tmp_path):
    run = [sys.executable, "-m", "minorca.train", *workplace("output", **{"train.steps": 100_000})]
    with subprocess.Popen(
        run, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            wait_until(lambda: any((tmp_path / "output" / "tensorboard").glob("*")))
            shutil.rmtree(tmp_path / gone)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    last = err.splitlines()[-1]
    assert process.returncode == 2 and "Traceback" not in err, err[-3000:]
    assert (
        last.startswith(f"minorca: error: {tmp_path / 'output'}/") and "was removed while the run wrote there" in last
    )


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="mounts file systems")
@pytest.mark.parametrize(
    "place, options, said",
    [
        (
            "/dev/shm",
            "ro",
            "/dev/shm: processes share locks there, which cannot be made ([Errno 30] Read-only file system)",
        ),
        ("/dev/shm", "size=4k,nr_inodes=1", "/dev/shm: processes share locks there, which cannot be made ([Errno 28]"),
        ("store", "size=4k,nr_inodes=1", ".lock: cannot be locked (its disk has no inodes left"),
        ("store", "size=4k,nr_inodes=2", "its disk has no inodes left"),
        ("store", "ro", "Read-only file system"),
        # two numbers, so that the first file without one is of safetensors or ours
        ("output", "size=400k,nr_inodes=9", "its disk has no inodes left"),
        ("output", "size=400k,nr_inodes=12", "its disk has no inodes left"),
        ("output", "size=4k", "No space left on device"),
    ],
)
def test_file_systems_that_take_nothing(place, options, said, workplace, tmp_path):
    rows = (tmp_path / "rows.jsonl").read_text()
    # more than are rendered in one process
    if place == "/dev/shm":
        (tmp_path / "rows.jsonl").write_text(rows * (11_000 // rows.count("\n")))
    directory = place if place.startswith("/") else tmp_path / place
    Path(directory).mkdir(exist_ok=True)
    settings = workplace("output", **{"train.steps": 2, "data.store": tmp_path / "store"})
    command = f'mount -t tmpfs -o {options} tmpfs "{directory}" && exec "$@"'
    run = [*MOUNTED, command, "bash", sys.executable, "-m", "minorca.train", *settings]
    done = subprocess.run(run, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert said in done.stderr.splitlines()[-1] and done.stderr.splitlines()[-1].startswith("minorca: error: ")
