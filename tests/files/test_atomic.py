"""Directories that appear complete."""

import os

from minorca.files.atomic import publish


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
