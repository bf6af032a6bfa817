"""Results of requests on disk: an evaluation that was interrupted goes on where it was, and a repeated one computes
nothing.

A result is found by what it follows from: the request's ids and options, and everything about the model and its
arithmetic. Two adapters of one model never share a result.
"""

import dataclasses
import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minorca.data.tokenizer import Tokenizer
from minorca.errors import UserError
from minorca.files.adapters import adapter_paths
from minorca.files.atomic import sha256_each
from minorca.files.safe_io import quote
from minorca.files.weights import open_model
from minorca.model.quantization import Quantization

# The version of the table and of what keys are made of. Results of another format are not found.
FORMAT = 1
# seconds between writes, whose loss is all that a kill costs
PERIOD = 2.0
# seconds to wait for another process that writes
PATIENCE = 60.0
ELSEWHERE = "choose another directory by --cache, or give --no-cache"
# keys in one question to the database, below SQLite's limit of variables
BATCH = 500


def identity(
    model: str | Path, adapter: str | Path | None, quantization: Quantization | None, tok: Tokenizer
) -> dict[str, object]:
    """What results follow from beside requests and arithmetic: the files' contents, wherever they lie.

    Raises:
        UserError: a file that is missing or invalid.
    """
    files = open_model(model, quantization)
    paths = [*files.paths, tok.file]
    if adapter is not None:
        paths += adapter_paths(adapter)
    digests = sha256_each(paths)
    how = dataclasses.asdict(files.quantization) if files.quantization else None
    return {"files": digests, "architecture": dataclasses.asdict(files.arch), "quantization": how}


class ResultCache:
    """Results of one model, in a file that all models share.

    Args:
        directory: of the file; created with the first result.
        model: what results follow from beside the request; see `identity`.

    Raises:
        UserError: the directory cannot be written, or the file is damaged.
    """

    def __init__(self, directory: Path, model: Mapping[str, object]):
        self.path = directory / "results.sqlite"
        self._model = hashlib.sha256(json.dumps([FORMAT, model], sort_keys=True).encode()).digest()
        self._added: list[tuple[bytes, str, bytes]] = []
        self._written = time.monotonic()
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot be written ({error}); {ELSEWHERE}", path=directory) from None
        with self._errors():
            self._database = sqlite3.connect(self.path, timeout=PATIENCE)
            tables = self._database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        if foreign := [name for (name,) in tables if name != "results"]:
            raise UserError(
                f"is a database of another program, with a table {quote(foreign[0])}; {ELSEWHERE}", path=self.path
            )
        with self._errors():
            self._database.execute("CREATE TABLE IF NOT EXISTS results (key BLOB PRIMARY KEY, value TEXT, check_ BLOB)")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise UserError(f"cannot be used to keep results ({error}); {ELSEWHERE}", path=self.path) from None
            message = f"is held by another process for over {PATIENCE:.0f} s; wait for it, {ELSEWHERE}"
            raise UserError(message, path=self.path) from None
        except sqlite3.Error as error:
            raise UserError(
                f"cannot be used to keep results ({error}); delete it, {ELSEWHERE}", path=self.path
            ) from None

    def find(self, requests: Sequence[bytes]) -> dict[bytes, Any]:
        """The results that are there, by the digests of their requests.

        Raises:
            UserError: the file is damaged.
        """
        by_key = {self._key(request): request for request in requests}
        keys = list(by_key)
        found: dict[bytes, Any] = {}
        for start in range(0, len(keys), BATCH):
            batch = keys[start : start + BATCH]
            query = f"SELECT key, value, check_ FROM results WHERE key IN ({','.join('?' * len(batch))})"
            with self._errors():
                rows = self._database.execute(query, batch).fetchall()
            for key, value, check in rows:
                # SQLite has no checksums of its own
                if check != _checksum(key, value):
                    raise UserError("is damaged: a result does not match its checksum; delete it", path=self.path)
                found[by_key[key]] = json.loads(value)
        return found

    def add(self, request: bytes, result: object) -> None:
        """Keeps a result, which JSON must be able to spell, by the digest of its request; on disk within seconds.

        Raises:
            UserError: the file cannot be written.
        """
        key, value = self._key(request), json.dumps(result)
        self._added.append((key, value, _checksum(key, value)))
        if time.monotonic() - self._written > PERIOD:
            self.write()

    def write(self) -> None:
        """Writes what was added since the last time."""
        with self._errors(), self._database:
            self._database.executemany("INSERT OR REPLACE INTO results VALUES (?, ?, ?)", self._added)
        self._added.clear()
        self._written = time.monotonic()

    def _key(self, request: bytes) -> bytes:
        return hashlib.sha256(self._model + request).digest()


def _checksum(key: bytes, value: str) -> bytes:
    return hashlib.sha256(key + value.encode()).digest()[:8]
