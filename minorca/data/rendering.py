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
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing import resource_tracker
from pathlib import Path
from typing import cast

import numpy as np

from minorca.config import DataConfig
from minorca.data.chat_template import render
from minorca.data.conversation import Conversation, Preference, drop_empty_answers, is_trained_answer, only_last_answer
from minorca.data.rendered import Rendered
from minorca.data.row_files import RowError
from minorca.data.sources import Row, SourceReader, read_rows
from minorca.data.store import TokenStore
from minorca.data.tally import Tally, reason_of
from minorca.data.tokenizer import Tokenizer, load_tokenizer
from minorca.data.tree import LEFT_OUT, join_answers, select_answers
from minorca.errors import UserError

# Token stores are found again by this number, so raise it with every change that gives any row other ids, another loss
# mask or another outcome (kept, truncated, dropped), in whichever module. Do not raise it for changes that affect no
# row: it makes every user render again. tests/data/test_rendering.py fails if rendering changes and this does not.
RENDERER_VERSION = 2

# Rows are passed to rendering processes in chunks.
CHUNK_ROWS = 250
# Up to this number of rows, rendering here takes less time than starting processes.
SERIAL_ROWS = 10_000

# Rows of one source, by its number. An error in reading takes the place of its row, or of all that follow.
Chunk = tuple[int, list[Row | UserError]]
RenderedChunk = tuple[int, TokenStore, Tally]


def render_row(row: Row, tok: Tokenizer, template: str, data: DataConfig) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """A row of any format but preference, as it is trained.

    Returns:
        Its ids [n] uint32; its loss mask [n] bool, True for trained tokens, of which the first is never one; and what
        the user should know of it, to be counted.

    Raises:
        UserError: a message that is invalid or cannot be rendered, with the row's file and place.
    """
    try:
        rendered = _render(cast(Conversation | str, row.content), tok, template, data)
    except UserError as error:
        if error.path is not None:
            # A file of the model is at fault for this row: the message names both.
            raise UserError(str(error), path=row.path, where=row.where) from None
        error.path = row.path
        error.where = row.where
        raise
    except RecursionError:
        message = "has tools, calls or results that are nested too deeply; fix or remove the row"
        raise UserError(message, path=row.path, where=row.where) from None
    trained = np.array(rendered.trained, bool)
    if data.train_on == "all":
        trained[:] = True
    trained[:1] = False
    return np.array(rendered.ids, np.uint32), trained, rendered.notes


def _render(content: Conversation | str, tok: Tokenizer, template: str, data: DataConfig) -> Rendered:
    if isinstance(content, str):
        ids = tok.encode_rendered(content, data.parse_control_tokens, eos=True)
        return Rendered(ids, [True] * len(ids), _note_control_tokens(content, tok, data))
    messages = only_last_answer(content.messages) if data.train_on == "last" else content.messages
    rendered = render(tok, messages, template, data.train_on != "all", content.tools, data.parse_control_tokens)
    if data.train_on == "all" and any(m["role"] == "assistant" and not is_trained_answer(m) for m in messages):
        rendered.notes.append("with excluded answers, which train_on: all trains")
    if template == "none":
        rendered.notes += _note_control_tokens("".join(m["content"] for m in messages), tok, data)
    return rendered


def _note_control_tokens(text: str, tok: Tokenizer, data: DataConfig) -> list[str]:
    parsed = data.parse_control_tokens and len(tok.split_control(text)) > 1
    return ["with control tokens parsed"] if parsed else []


@dataclass
class Outcome:
    """What becomes of a row.

    Attributes:
        ids, trained: [n], the row and its loss mask as `render_row` returns them; empty if it cannot be rendered.
        pieces: (start, end) of what is used of it: nothing, the row, its start, or pieces that overlap by the one token
            that is not trained at the start of each.
        dropped: why nothing is used, None if something is.
        error: what is wrong with the row; training on it ends with this error unless it is dropped for that.
        empty_answers: how many answers are left out with their questions.
        notes: what else the user should know.
        branch_starts, branch_scores: of a tree, as a store has them.
    """

    ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint32))
    trained: np.ndarray = field(default_factory=lambda: np.empty(0, bool))
    pieces: list[tuple[int, int]] = field(default_factory=list)
    dropped: str | None = None
    error: UserError | None = None
    empty_answers: int = 0
    notes: list[str] = field(default_factory=list)
    branch_starts: list[int] = field(default_factory=list)
    branch_scores: list[float] = field(default_factory=list)


def decide(row: Row | RowError, tok: Tokenizer, data: DataConfig, template: str) -> Outcome:
    """Renders a row and decides what becomes of it."""
    if isinstance(row, RowError):
        return _reject(row, data)
    if row.dropped:
        return Outcome(dropped=row.dropped)
    if isinstance(row.content, Preference):
        return _decide_preference(row, row.content, tok, data, template)
    content, empty_answers = _without_empty_answers(row.content)
    if empty_answers and data.empty_response == "error":
        return _reject_empty(row)
    if content is None:
        return Outcome(dropped="empty response")
    try:
        ids, trained, notes = render_row(row._replace(content=content), tok, template, data)
    except UserError as error:
        return _reject(error, data)
    outcome = Outcome(ids, trained, [(0, len(ids))], empty_answers=empty_answers, notes=notes)
    if len(ids) > data.seq_len:
        _shorten(outcome, row, data)
    if outcome.pieces:
        outcome.pieces = [(start, end) for start, end in outcome.pieces if trained[start + 1 : end].any()]
        if not outcome.pieces:
            outcome.dropped = "nothing to train on"
    return outcome


def _decide_preference(row: Row, preference: Preference, tok: Tokenizer, data: DataConfig, template: str) -> Outcome:
    selected, notes = select_answers(preference, data.pairs, template)
    if LEFT_OUT in notes and data.empty_response == "error":
        return _reject_empty(row)
    if selected is None:
        return Outcome(dropped="empty response")
    try:
        rendered = [render_row(row._replace(content=answer), tok, template, data) for answer in selected.answers]
        tree = join_answers([(ids, trained) for ids, trained, _ in rendered], selected.scores)
    except UserError as error:
        error.path, error.where = error.path or row.path, row.where
        return _reject(error, data)
    notes += [*dict.fromkeys(note for _, _, more in rendered for note in more), *tree.notes]
    pieces = [] if tree.dropped else [(0, len(tree.ids))]
    outcome = Outcome(
        tree.ids,
        tree.trained,
        pieces,
        tree.dropped,
        notes=notes,
        branch_starts=tree.starts,
        branch_scores=tree.scores,
    )
    if pieces and len(tree.ids) > data.seq_len:
        _shorten(outcome, row, data)
    return outcome


def _reject_empty(row: Row) -> Outcome:
    message = "the response is empty; fix the row, or set data.empty_response to drop"
    return Outcome(error=UserError(message, path=row.path, where=row.where))


def _reject(error: UserError, data: DataConfig) -> Outcome:
    if not isinstance(error, RowError):
        error = RowError(error.message, path=error.path, where=error.where, field=error.field, advice=error.advice)
    return Outcome(error=error, dropped=reason_of(error) if data.bad_rows == "drop" else None)


def _without_empty_answers(content: Conversation | str) -> tuple[Conversation | str | None, int]:
    """The content without the turns whose answers are empty, None if no answer is left; and how many were empty."""
    if isinstance(content, str):
        return (content, 0) if content.strip() else (None, 1)
    messages, count = drop_empty_answers(content.messages)
    if not count:
        return content, 0
    if not any(map(is_trained_answer, messages)):
        return None, count
    return Conversation(messages, content.tools), count


def _shorten(outcome: Outcome, row: Row, data: DataConfig) -> None:
    """Decides what becomes of a row that is longer than data.seq_len."""
    length = len(outcome.ids)
    outcome.pieces = []
    if data.too_long == "drop":
        outcome.dropped = "too long"
    elif data.too_long == "truncate":
        outcome.pieces = [(0, data.seq_len)]
    elif data.too_long == "split":
        # The last token of each piece is also the first of the next, where it is not trained again.
        starts = range(0, length - 1, data.seq_len - 1)
        outcome.pieces = [(start, min(start + data.seq_len, length)) for start in starts]
    else:
        message = f"has {length} tokens, more than data.seq_len, {data.seq_len}; raise it, or set data.too_long"
        outcome.error = UserError(message, path=row.path, where=row.where)


def render_rows(
    rows: Iterable[Row | UserError], tok: Tokenizer, data: DataConfig, template: str
) -> tuple[TokenStore, Tally]:
    """Renders rows in memory.

    Args:
        rows: an invalid row is given as the error, and so is a file that cannot be read, which ends the rows.

    Returns:
        The rows that are used, and what became of all.
    """
    kept: list[tuple[Row, np.ndarray, np.ndarray]] = []
    # The starts and scores of each kept row's branches, if rows are trees.
    branches: list[tuple[list[int], list[float]]] = []
    tally = Tally()
    for row in rows:
        if isinstance(row, UserError) and not isinstance(row, RowError):
            tally.broken = row
            break
        outcome = decide(row, tok, data, template)
        _count(tally, outcome)
        for start, end in outcome.pieces:
            trained = outcome.trained[start:end].copy()
            trained[:1] = False
            kept.append((cast(Row, row), outcome.ids[start:end], trained))
            if outcome.branch_starts:
                branches.append((outcome.branch_starts, outcome.branch_scores))
    tokens = np.concatenate([ids for _, ids, _ in kept] or [np.empty(0, np.uint32)])
    store = TokenStore(
        tokens=tokens.astype(np.uint16 if tok.vocab_size <= 65536 else np.uint32),
        trained=np.concatenate([trained for _, _, trained in kept] or [np.empty(0, bool)]),
        offsets=np.cumsum([0, *(len(ids) for _, ids, _ in kept)]),
        numbers=np.array([row.number for row, _, _ in kept], np.int64),
        files=np.array([row.file for row, _, _ in kept], np.int32),
        row_trained=np.array([trained.sum() for _, _, trained in kept], np.int32),
    )
    if branches:
        store.branch_offsets = np.cumsum([0, *(len(starts) for starts, _ in branches)])
        store.branch_starts = np.array([start for starts, _ in branches for start in starts], np.int32)
        store.branch_scores = np.array([score for _, scores in branches for score in scores], np.float32)
    if kept:
        tally.counts.update({"kept": len(kept), "tokens": len(tokens), "trained tokens": int(store.trained.sum())})
    return store, tally


def _count(tally: Tally, outcome: Outcome) -> None:
    if outcome.error and outcome.dropped:
        tally.add_bad_row(outcome.error)
    elif outcome.error:
        tally.add_error(outcome.error)
    elif outcome.dropped:
        tally.counts[f"dropped: {outcome.dropped}"] += 1
        tally.tokens[f"dropped: {outcome.dropped}"] += len(outcome.ids)
    else:
        if outcome.empty_answers:
            tally.counts["empty answers, dropped with their questions"] += outcome.empty_answers
        if outcome.pieces[-1][1] < len(outcome.ids):
            tally.counts["truncated"] += 1
            tally.tokens["truncated"] += len(outcome.ids) - outcome.pieces[-1][1]
        if len(outcome.pieces) > 1:
            tally.counts["split"] += 1
        if outcome.notes:
            tally.counts.update(outcome.notes)


def render_sources(
    readers: list[SourceReader], tok: Tokenizer, template: str, data: DataConfig, counts: list[Counter]
) -> Generator[RenderedChunk]:
    """Renders all rows of opened sources, in order.

    Yields:
        The number of a source, some of its rows, and what became of them; `counts` gets what reading counts.

    Raises:
        UserError: a rendering process that was killed.
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
    """All rows in order. A file that cannot be read is passed on as the error, as reading runs ahead of rendering."""
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
    started = (tok.path, tok.new_tokens, data, template)
    try:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, started)
    # its locks are files there
    except OSError as error:
        remedy = (
            "mount it writable with some free space (docker run --shm-size 64m), or start on one core (taskset -c 0)"
        )
        raise UserError(
            f"processes share locks there, which cannot be made ({error}); {remedy}", path="/dev/shm"
        ) from None
    try:
        for source, chunk in chunks:
            with _blocking_sigint():
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
def _blocking_sigint():
    """Holds a Ctrl-C back until the end.

    Processes started meanwhile inherit this, so Ctrl-C never reaches them: the process that started them handles it.
    """
    # multiprocessing starts it before its first process, and unblocks SIGINT after.
    resource_tracker.ensure_running()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


# ------------------------------------------------------------------------------------------- in a rendering process

# The tokenizer, settings and template of a rendering process.
_worker: tuple[Tokenizer, DataConfig, str] | None = None


def _start_worker(path: Path, new_tokens: tuple[str, ...], data: DataConfig, template: str) -> None:
    global _worker
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = (load_tokenizer(path, new_tokens), data, template)


def _exit_with_parent() -> None:
    """A parent that was killed cannot end its processes."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _render_in_worker(chunk: list[Row | UserError]) -> tuple[TokenStore, Tally]:
    assert _worker is not None
    return render_rows(chunk, *_worker)
