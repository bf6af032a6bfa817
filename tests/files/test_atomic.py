"""Files and directories that appear complete."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minorca.errors import UserError
from minorca.files.atomic import check_output, publish, remove_unfinished, write_file
from tests.helpers import ENVIRONMENT


def test_everything_is_synchronised_before_it_appears(tmp_path, monkeypatch):
    """Files and directories at any depth."""
    synchronised = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synchronised.add(os.fstat(descriptor).st_ino))

    def write(temporary):
        (temporary / "a" / "b").mkdir(parents=True)
        for path in ("x", "a/x", "a/b/x"):
            (temporary / path).write_text(path)

    publish(tmp_path / "out", write)
    write_file(tmp_path / "file", "text")
    written = [tmp_path / "out", *(tmp_path / "out").rglob("*"), tmp_path / "file"]
    assert len(written) == 7 and synchronised == {path.stat().st_ino for path in [*written, tmp_path]}


def test_a_written_file_replaces_nothing_but_a_file(tmp_path):
    """What a link leads to is replaced, and a pipe or a device is written to."""
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    write_file(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reading = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_file(tmp_path / "pipe", b"through")
    assert os.read(reading, 99) == b"through" and (tmp_path / "pipe").is_fifo()
    os.close(reading)
    write_file(Path("/dev/null"), "gone")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(UserError, match="cannot be written .*File name too long"):
        write_file(tmp_path / ("x" * 300), "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "pipe"]


WRITES = """
import sys
from pathlib import Path
from minorca.files.atomic import check_output, write_file
for path in map(Path, sys.argv[1:]):
    check_output(path, "{")
    print("printed")
    write_file(path, "written\\n")
"""


def test_standard_output_is_appended_to(tmp_path):
    """By its names, and through a link, where the shell appends to a file that others have written."""
    (tmp_path / "link").symlink_to("/dev/stdout")
    paths = ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", tmp_path / "link"]
    (tmp_path / "log").write_text("mine\n")
    with (tmp_path / "log").open("a") as log:
        subprocess.run([sys.executable, "-c", WRITES, *paths], env=ENVIRONMENT, stdout=log, check=True)
    assert (tmp_path / "log").read_text() == "mine\n" + "printed\nwritten\n" * len(paths)


def test_what_is_left_of_a_directory_is_removed_unless_it_holds_more(tmp_path):
    unfinished = tmp_path / ("out.tmp-" + "0123456789abcdef" * 2)
    for directory in (unfinished, tmp_path / "out"):
        directory.mkdir()
        (directory / "ours").touch()
        (directory / "mine").touch()
    for directory, state in ((unfinished, "was not finished"), (tmp_path / "out", "is damaged")):
        with pytest.raises(UserError, match=f"{directory.name}: {state}, and holds mine, which is none of its files"):
            remove_unfinished(tmp_path / "out", {"ours"})
        (directory / "mine").unlink()
    remove_unfinished(tmp_path / "out", {"ours"})
    assert not any(tmp_path.iterdir())


def test_an_output_is_checked_before_the_work(tmp_path):
    check_output(tmp_path / "new" / "file.json", "{", [tmp_path / "new" / "file.md"])
    check_output(Path("/dev/stdout"), "{")
    (tmp_path / "new" / "file.md").touch()
    with pytest.raises(UserError, match="file.md: exists, and would be written with file.json; choose another"):
        check_output(tmp_path / "new" / "file.json", "{", [tmp_path / "new" / "file.md"])
    (tmp_path / "new" / "file.json").touch()
    check_output(tmp_path / "new" / "file.json", "{", [tmp_path / "new" / "file.md"])
    with pytest.raises(UserError, match="new: is not a file that can be written"):
        check_output(tmp_path / "new", "{")
    with pytest.raises(UserError, match="file.md: cannot be made"):
        check_output(tmp_path / "new" / "file.md" / "deeper", "{")
