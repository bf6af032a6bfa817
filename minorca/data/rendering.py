"""Renders rows to ids and loss masks, in this process or, where they are many, in one process for each core."""

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np

from minorca.config import DataConfig
from minorca.data.chat_template import render
from minorca.data.conversation import Conversation
from minorca.data.sources import Row, SourceReader, read_rows
from minorca.data.store import TokenStore
from minorca.data.tokenizer import Tokenizer, load_tokenizer
from minorca.errors import UserError

# Token stores are found again by this number, so raise it with every change that gives any row other ids, another loss
# mask or another outcome (kept, truncated, dropped), in whichever module. Do not raise it for changes that affect no
# row: it makes every user render again. tests/data/test_rendering.py fails if rendering changes and this does not.
RENDERER_VERSION = 1

# Rows are passed to rendering processes in chunks.
CHUNK_ROWS = 250
# Up to this number of rows, rendering here takes less time than starting processes.
SERIAL_ROWS = 10_000

# Rows of one source, by its number. An error in reading takes the place of its row.
Chunk = tuple[int, list[Row | UserError]]
RenderedChunk = tuple[int, TokenStore, Counter]


def render_row(
    row: Row, tok: Tokenizer, template: str, train_on: str, parse_control: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """A row's ids [n] uint32 and its loss mask [n] bool, True for trained tokens; the first token is never trained.

    Args:
        parse_control: of a row of text, as in `Tokenizer.encode_rendered`.

    Raises:
        UserError: a message that is invalid or cannot be rendered, with the row's file and place.
    """
    try:
        if isinstance(row.content, str):
            ids = tok.encode_rendered(row.content, parse_control, eos=True)
            trained = np.ones(len(ids), bool)
        else:
            rendered = render(tok, row.content.messages, template, masked=train_on == "response")
            ids = rendered.ids
            trained = np.array(rendered.trained, bool)
    except UserError as error:
        if error.path is not None:
            # A file of the model is at fault for this row: the message names both.
            raise UserError(str(error), path=row.path, where=row.where) from None
        error.path = row.path
        error.where = row.where
        raise
    if train_on == "all":
        trained[:] = True
    trained[:1] = False
    return np.array(ids, np.uint32), trained


def _has_empty_response(content: Conversation | str) -> bool:
    if isinstance(content, str):
        return not content.strip()
    return any(m["role"] == "assistant" and m.get("weight") != 0 and not m["content"].strip() for m in content.messages)


def render_rows(
    rows: Iterable[Row | UserError], tok: Tokenizer, data: DataConfig, template: str
) -> tuple[TokenStore, Counter]:
    """Renders rows in memory.

    Returns:
        The rows that are used, and the counts of rows by outcome.

    Raises:
        UserError: an error among the rows; an invalid row; an empty or too long row where the settings make it an
            error.
    """
    kept: list[tuple[int, np.ndarray, np.ndarray]] = []
    counts = Counter()
    for row in rows:
        if isinstance(row, UserError):
            raise row
        if _has_empty_response(row.content):
            if data.empty_response == "error":
                raise UserError(
                    "the response is empty; fix the row, or set data.empty_response to drop",
                    path=row.path,
                    where=row.where,
                )
            counts["dropped: empty response"] += 1
            continue
        ids, trained = render_row(row, tok, template, data.train_on, data.parse_control_tokens)
        if len(ids) > data.seq_len:
            if data.too_long == "error":
                raise UserError(
                    f"has {len(ids)} tokens, more than data.seq_len, {data.seq_len}; raise it, or set data.too_long",
                    path=row.path,
                    where=row.where,
                )
            if data.too_long == "drop":
                counts["dropped: too long"] += 1
                continue
            ids = ids[: data.seq_len]
            trained = trained[: data.seq_len]
            counts["truncated"] += bool(trained.any())
        if not trained.any():
            counts["dropped: nothing to train on"] += 1
            continue
        if isinstance(row.content, str) and data.parse_control_tokens:
            counts["with control tokens parsed"] += len(tok.split_control(row.content)) > 1
        counts.update({"kept": 1, "tokens": len(ids), "trained tokens": int(trained.sum())})
        kept.append((row.number, ids, trained))
    tokens = np.concatenate([ids for _, ids, _ in kept] or [np.empty(0, np.uint32)])
    store = TokenStore(
        tokens=tokens.astype(np.uint16 if tok.vocab_size <= 65536 else np.uint32),
        trained=np.concatenate([trained for _, _, trained in kept] or [np.empty(0, bool)]),
        offsets=np.cumsum([0, *(len(ids) for _, ids, _ in kept)]),
        numbers=np.array([number for number, _, _ in kept], np.int64),
        row_trained=np.array([trained.sum() for _, _, trained in kept], np.int32),
    )
    return store, counts


def render_sources(
    readers: list[SourceReader], tok: Tokenizer, template: str, data: DataConfig, counts: list[Counter]
) -> Generator[RenderedChunk]:
    """Renders all rows of opened sources, in order.

    Yields:
        The number of a source, some of its rows, and their counts by outcome; `counts` gets what reading counts.

    Raises:
        UserError: the first error in the order of the rows; a rendering process that was killed.
    """
    chunks = _read_chunks(readers, data.limit, counts)
    first = []
    rows = 0
    for chunk in chunks:
        first.append(chunk)
        rows += len(chunk[1])
        if rows >= SERIAL_ROWS:
            break
    cores = len(os.sched_getaffinity(0))
    chunks = chain(first, chunks)
    if rows >= SERIAL_ROWS and cores > 1:
        yield from _render_in_processes(chunks, tok, data, template, cores)
    else:
        for source, chunk in chunks:
            yield source, *render_rows(chunk, tok, data, template)


def _read_chunks(readers: list[SourceReader], limit: int | None, counts: list[Counter]) -> Iterator[Chunk]:
    """All rows in order. An error in reading is passed on in place of its row, as reading runs ahead of rendering."""
    for n, reader in enumerate(readers):
        chunk: list[Row | UserError] = []
        try:
            for row in read_rows(reader, limit, counts[n]):
                chunk.append(row)
                if len(chunk) == CHUNK_ROWS:
                    yield n, chunk
                    chunk = []
        except UserError as error:
            chunk.append(error)
        yield n, chunk


def _render_in_processes(
    chunks: Iterator[Chunk], tok: Tokenizer, data: DataConfig, template: str, workers: int
) -> Iterator[RenderedChunk]:
    waiting: deque = deque()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (tok.path, data, template))
    try:
        for source, chunk in chunks:
            with _ignoring_sigint():
                waiting.append((source, pool.submit(_render_in_worker, chunk)))
            while len(waiting) > 2 * workers:
                source, future = waiting.popleft()
                yield source, *future.result()
        for source, future in waiting:
            yield source, *future.result()
    except BrokenProcessPool:
        raise UserError(
            "a process that renders rows was killed, perhaps because memory ran out; start again on fewer cores "
            "(taskset -c 0-3 ...)"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _ignoring_sigint():
    """Processes started meanwhile ignore Ctrl-C from their first moment: the process that started them handles it."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


# ------------------------------------------------------------------------------------------- in a rendering process

# The tokenizer, settings and template of a rendering process.
_worker: tuple[Tokenizer, DataConfig, str] | None = None


def _start_worker(path: Path, data: DataConfig, template: str) -> None:
    global _worker
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = (load_tokenizer(path), data, template)


def _exit_with_parent() -> None:
    """A parent that was killed cannot end its processes."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _render_in_worker(chunk: list[Row | UserError]) -> tuple[TokenStore, Counter]:
    assert _worker is not None
    return render_rows(chunk, *_worker)
