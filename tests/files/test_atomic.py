"""Files and directories that appear complete."""

import os
from pathlib import Path

import pytest

from minorca.errors import UserError
from minorca.files.atomic import check_output, publish, write_file


def test_everything_is_synchronised_before_it_appears(tmp_path, monkeypatch):
    """Files and directories at any depth."""
    synchronised = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synchronised.add(os.fstat(descriptor).st_ino))

    def write(temporary):
        (temporary / "a" / "b").mkdir(parents=True)
        for path in ("x", "a/x", "a/b/x"):
            (temporary / path).write_text(path)

    publish(tmp_path / "out", write)
    written = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert len(written) == 6 and synchronised == {path.stat().st_ino for path in [*written, tmp_path]}


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
