"""Rows rendered once, to ids and the mask of trained tokens, in memory-mapped files that later runs find again.

A store is a directory named by all that decides its rows: what the sources hold, the tokenizer's files, the template, the
settings and the code that renders. It is complete or absent, built by one process while others wait. All in it can be made
again, so a damaged one is.
"""

import hashlib
import importlib.metadata
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from minorca.config import DataConfig, Source
from minorca.data.chat_template import render
from minorca.data.sources import Records, Row, open_source, read_rows
from minorca.data.tokenizer import Tokenizer, load_tokenizer
from minorca.errors import UserError
from minorca.files.atomic import lock, publish, sha256, verify_manifest, write_manifest

log = logging.getLogger(__name__)

CHUNK = 250  # rows rendered at a time
SERIAL = 10_000  # rows that this process renders before others would have started
TYPES = {
    "trained": np.bool_,
    "offsets": np.int64,
    "row_trained": np.int32,
    "numbers": np.int64,
}  # tokens: meta.json says
MODEL_FILES = (
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
)
SETTINGS = ("limit", "seq_len", "train_on", "too_long", "empty_response")
CODE = ("data/chat_template.py", "data/sandbox.py", "data/tokenizer.py", "data/sources.py", "data/store.py")
LIBRARIES = ("tokenizers", "sentencepiece", "jinja2")
TOTALS = ("kept", "tokens", "trained tokens")


class Part(NamedTuple):
    """A source's rows in a store: first, first + 1, ... last - 1, and how many rows had which fate."""

    path: str
    unit: str
    first: int
    last: int
    counts: dict[str, int]


@dataclass
class TokenStore:
    """N rows, chosen by `indices` from R that lie end to end.

    tokens [S] uint16 or uint32; trained [S] bool, True where the token is predicted in the loss; offsets [R+1] int64; numbers [R]
    int64, each row's line or row in its file; row_trained [R] int32, how many tokens it trains; indices [N] int64, all R by default.
    A store that was opened is memory-mapped.
    """

    tokens: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    numbers: np.ndarray | None = None
    row_trained: np.ndarray | None = None
    parts: list[Part] = field(default_factory=list)
    path: Path | None = None
    digest: str | None = None
    indices: np.ndarray | None = None

    def __post_init__(self):
        if self.indices is None:
            self.indices = np.arange(len(self.offsets) - 1)

    def __len__(self) -> int:
        return len(self.indices)

    @cached_property
    def lengths(self) -> np.ndarray:
        """[N] int64"""
        return np.diff(self.offsets)[self.indices]

    @cached_property
    def trained_counts(self) -> np.ndarray:
        """[N]: how many tokens each row trains."""
        if self.row_trained is None:
            self.row_trained = np.diff(np.concatenate([[0], np.cumsum(self.trained)])[self.offsets])
        return self.row_trained[self.indices]

    @property
    def sections(self) -> list[tuple[int, int]]:
        """(first, last) of each source's rows, `last` not among them."""
        return [tuple(np.searchsorted(self.indices, [part.first, part.last]).tolist()) for part in self.parts]

    def sha256(self) -> str:
        """Of all its rows: what a run that resumes must find again."""
        if self.digest is None:
            digest = hashlib.sha256()
            for array in (self.tokens, self.trained, self.offsets):
                digest.update(np.ascontiguousarray(array))
            self.digest = digest.hexdigest()
        return self.digest

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """A row's ids and mask."""
        row = self.indices[index]
        span = slice(self.offsets[row], self.offsets[row + 1])
        return self.tokens[span], self.trained[span]

    def where(self, index: int) -> str:
        """The file a row is from, and its line or row there."""
        row = self.indices[index]
        part = next(part for part in self.parts if part.first <= row < part.last)
        return f"{part.path}, {part.unit} {self.numbers[row]}"

    def select(self, indices: Iterable[int]) -> "TokenStore":
        """The rows at `indices`, tokens not copied. `sections` are right where the indices rise."""
        chosen = np.asarray(indices, np.int64)
        digest = hashlib.sha256(self.sha256().encode() + chosen.tobytes()).hexdigest()
        return replace(self, indices=self.indices[chosen], digest=digest)

    def report(self) -> None:
        """Logs what became of each source's rows."""
        for part in self.parts:
            log.info("%s: %s", part.path, _told(part.counts))


def _told(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.items())


# ------------------------------------------------------------------------------------------------------------- rendering


def render_row(row: Row, tok: Tokenizer, template: str, train_on: str) -> tuple[np.ndarray, np.ndarray]:
    """A row's ids [n] uint32 and the mask [n] of the tokens it trains; the first token is never predicted."""
    try:
        if isinstance(row.content, str):
            ids = tok.encode(row.content, bos=tok.adds_bos, eos=True)
            trained = np.ones(len(ids), bool)
        else:
            rendered = render(tok, row.content, template, masked=train_on == "response")
            ids, trained = rendered.ids, np.array(rendered.trained, bool)
    except UserError as error:
        raise UserError(f"{error}", path=row.where) from None
    if train_on == "all":
        trained[:] = True
    trained[:1] = False
    return np.array(ids, np.uint32), trained


def _answers_nothing(content: list[dict] | str) -> bool:
    if isinstance(content, str):
        return not content.strip()
    return any(m["role"] == "assistant" and m.get("weight") != 0 and not m["content"].strip() for m in content)


def render_rows(
    rows: Iterable[Row | UserError], tok: Tokenizer, data: DataConfig, template: str
) -> tuple[TokenStore, Counter]:
    """All rows worth training on, in memory, and the counts of what became of the others.

    Raises:
        UserError: one that is among the rows; or naming the row, where the settings say that an empty or over-long one is an error.
    """
    kept, counts = [], Counter()
    for row in rows:
        if isinstance(row, UserError):
            raise row
        if _answers_nothing(row.content):
            if data.empty_response == "error":
                raise UserError(
                    "the response is empty; mend the row, or set data.empty_response to drop", path=row.where
                )
            counts["dropped: empty response"] += 1
            continue
        ids, trained = render_row(row, tok, template, data.train_on)
        if len(ids) > data.seq_len:
            if data.too_long == "error":
                raise UserError(
                    f"{len(ids)} tokens, over data.seq_len, {data.seq_len}; raise it, or set data.too_long",
                    path=row.where,
                )
            if data.too_long == "drop":
                counts["dropped: too long"] += 1
                continue
            ids, trained = ids[: data.seq_len], trained[: data.seq_len]
            counts["truncated"] += bool(trained.any())
        if not trained.any():
            counts["dropped: nothing to train on"] += 1
            continue
        counts.update({"kept": 1, "tokens": len(ids), "trained tokens": int(trained.sum())})
        kept.append((row.number, ids, trained))
    tokens = np.concatenate([ids for _, ids, _ in kept] or [np.empty(0, np.uint32)])
    return TokenStore(
        tokens.astype(np.uint16 if tok.vocab_size <= 65536 else np.uint32),
        np.concatenate([trained for _, _, trained in kept] or [np.empty(0, bool)]),
        np.cumsum([0, *(len(ids) for _, ids, _ in kept)]),
        np.array([number for number, _, _ in kept], np.int64),
        np.array([trained.sum() for _, _, trained in kept], np.int32),
    ), counts


def _chunks(
    opened: list[Records], sources: list[Source], limit: int | None, counts: list[Counter]
) -> Iterator[tuple[int, list]]:
    """(source, rows of it) in order. An error in reading travels in its place, so that the first in the order of rows is reported."""
    for n, records in enumerate(opened):
        chunk: list[Row | UserError] = []
        try:
            for row in read_rows(records, sources[n].format, limit, counts[n]):
                chunk.append(row)
                if len(chunk) == CHUNK:
                    yield n, chunk
                    chunk = []
        except UserError as error:
            chunk.append(error)
        yield n, chunk


def _render_chunks(
    chunks: Iterator, tok: Tokenizer, data: DataConfig, template: str
) -> Iterator[tuple[int, TokenStore, Counter]]:
    """The chunks in order, rendered here where they are few, else by a process for every core."""
    first, workers = [], len(os.sched_getaffinity(0))
    for item in chunks:
        first.append(item)
        if sum(len(chunk) for _, chunk in first) >= SERIAL:
            break
    else:
        workers = 1
    chunks = chain(first, chunks)
    if workers == 1:
        for n, chunk in chunks:
            yield n, *render_rows(chunk, tok, data, template)
        return
    waiting: deque = deque()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (tok.path, data, template))
    try:
        for n, chunk in chunks:
            with _uninterrupted():
                waiting.append((n, pool.submit(_work, chunk)))
            while len(waiting) > 2 * workers:
                n, future = waiting.popleft()
                yield n, *future.result()
        for n, future in waiting:
            yield n, *future.result()
    except BrokenProcessPool:
        what = "a process that renders rows was killed, perhaps for want of memory"
        raise UserError(f"{what}; start again on fewer cores (taskset -c 0-3 ...)") from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _uninterrupted():
    """A process that starts meanwhile ignores Ctrl-C from its first moment: the one that started it answers."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


_worker: tuple = ()  # in a rendering process: tokenizer, settings and template


def _start_worker(path: Path, data: DataConfig, template: str) -> None:
    global _worker

    def follow() -> None:  # a parent that was killed says nothing
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = load_tokenizer(path), data, template


def _work(chunk: list) -> tuple[TokenStore, Counter]:
    return render_rows(chunk, *_worker)


# ----------------------------------------------------------------------------------------------------------- directories


def prepared(sources: list[Source], tok: Tokenizer, template: str, data: DataConfig) -> TokenStore:
    """The rows of all `sources` in order, rendered by `template` (a resolved name): from a store that is there, or by making one.

    Raises:
        UserError: whatever is wrong with a source or a row of it, a source of which no row is left, a directory that cannot be written.
    """
    root = Path(data.store).expanduser() if data.store else _cache()
    opened = [open_source(source, data.limit) for source in sources]
    name = _fingerprint(opened, sources, tok, template, data)
    directory = root / name
    if _intact(directory):
        return _open(directory, opened)
    with _alone(directory):
        if _intact(directory):  # another process made it while this one waited
            return _open(directory, opened)
        for leftover in (*root.glob(f"{name}.tmp-*"), directory):  # of builds that were killed, or damaged
            shutil.rmtree(leftover, ignore_errors=True)

        def write(temporary: Path) -> None:
            _build(temporary, opened, sources, tok, template, data)
            if _fingerprint(opened, sources, tok, template, data) != name:
                raise UserError(
                    "changed while being read; start again", path=", ".join(source.path for source in sources)
                )

        publish(directory, write)
        return _open(directory, opened)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "minorca" / "rows"


def _fingerprint(opened: list[Records], sources: list[Source], tok: Tokenizer, template: str, data: DataConfig) -> str:
    files = (
        path for path in (*tok.path.glob("tokenizer*"), *(tok.path / name for name in MODEL_FILES)) if path.is_file()
    )
    decides = {
        "sources": [(records.sha256(), source.format) for records, source in zip(opened, sources)],
        "tokenizer": {path.name: sha256(path) for path in files},
        "template": template,
        "settings": {key: getattr(data, key) for key in SETTINGS},
        "code": [sha256(Path(__file__).parent.parent / name) for name in CODE],
        "libraries": [importlib.metadata.version(library) for library in LIBRARIES],
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Holds the lock on a store; waits, in short sleeps that signals end, while another process does."""
    path, told = directory.with_name(f"{directory.name}.lock"), False
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot be written ({error}); set data.store to a directory that can", path=directory.parent
        ) from None
    while (held := lock(path)) is None:
        if not told and (holder := path.read_text().strip()):  # it writes its name just after it took the lock
            log.info("waiting for %s, which renders the same rows", holder)
            told = True
        time.sleep(0.1)
    with held:
        yield


def _intact(directory: Path) -> bool:
    """Whether a store is there, and every file of it as it was written."""
    if not directory.is_dir():
        return False
    try:
        verify_manifest(directory)
    except (UserError, OSError) as error:  # the second where another process is replacing it
        log.warning("%s; its rows are rendered anew", error)
        return False
    return True


def _map(directory: Path, kind: str) -> dict[str, np.ndarray]:
    """The arrays of a store, whose tokens are of type `kind`."""
    return {
        name: np.memmap(directory / f"{name}.bin", dtype, "r") for name, dtype in ({"tokens": kind} | TYPES).items()
    }


def _open(directory: Path, opened: list[Records]) -> TokenStore:
    meta = json.loads((directory / "meta.json").read_text())
    # the files may have moved since: what a message names is where they are now
    parts = [
        Part(records.path, records.unit, *part["rows"], part["counts"])
        for records, part in zip(opened, meta["sources"])
    ]
    return TokenStore(**_map(directory, meta["tokens"]), parts=parts, path=directory, digest=meta["sha256"])


def _build(
    directory: Path, opened: list[Records], sources: list[Source], tok: Tokenizer, template: str, data: DataConfig
) -> None:
    counts, total = [Counter() for _ in sources], 0
    with ExitStack() as stack:
        files = {name: stack.enter_context((directory / f"{name}.bin").open("wb")) for name in ("tokens", *TYPES)}
        np.zeros(1, np.int64).tofile(files["offsets"])
        rendered = stack.enter_context(
            closing(_render_chunks(_chunks(opened, sources, data.limit, counts), tok, data, template))
        )
        # disable=None: no bar where nobody looks
        bar = stack.enter_context(tqdm(desc="rendering", unit=" rows", unit_scale=True, leave=False, disable=None))
        for n, chunk, fates in rendered:
            counts[n].update(fates)
            (chunk.offsets[1:] + total).tofile(files["offsets"])
            for name in files.keys() - {"offsets"}:
                getattr(chunk, name).tofile(files[name])
            total, kind = total + len(chunk.tokens), chunk.tokens.dtype.name
            bar.update(len(chunk))
    parts, first = [], 0
    for records, source, fates in zip(opened, sources, counts):
        names = ["read", *sorted(fates.keys() - {"read", *TOTALS}), *TOTALS]
        fates = {name: fates[name] for name in names if fates[name]}
        if "kept" not in fates:
            raise UserError(f"no row is left to use ({_told(fates) or 'none is there'})", path=records.path)
        rows = (first, first := first + fates["kept"])
        parts.append(
            {"path": records.path, "unit": records.unit, "format": source.format, "rows": rows, "counts": fates}
        )
    meta = {"tokens": kind, "sources": parts, "sha256": TokenStore(**_map(directory, kind)).sha256()}
    (directory / "meta.json").write_text(json.dumps(meta, indent=2, ensure_ascii=False) + "\n")
    write_manifest(directory)
