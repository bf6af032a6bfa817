"""Finds the token store of given rows and settings, or builds it.

A store is found by a hash of everything that determines its rows: the content of the sources, the tokenizer's files,
the template, the settings, and the versions of the renderer and of the libraries it uses. One process builds a store
while others wait. A store can always be built again, so a damaged one is replaced.
"""

import hashlib
import importlib.metadata
import json
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from minorca.config import DataConfig, Source
from minorca.data.rendering import RENDERER_VERSION, render_sources
from minorca.data.sources import SourceReader, open_source
from minorca.data.store import (
    ARRAYS,
    BRANCH_TYPES,
    FORMAT,
    STORE_FILES,
    TokenStore,
    finish_store,
    open_store,
    summarize,
)
from minorca.data.tally import Tally, raise_errors
from minorca.data.tokenizer import Tokenizer
from minorca.data.tokenizer_files import tokenizer_paths
from minorca.errors import UserError
from minorca.files.atomic import lock, publish, remove_unfinished, sha256
from minorca.files.safe_io import cache_directory, find_file, user_path
from minorca.progress import progress_bar

log = logging.getLogger(__name__)

# What determines the rows beside the sources and the tokenizer's files: files of the model, settings in `data`,
# libraries.
MODEL_FILES = ("config.json", "params.json")
SETTINGS = ("limit", "seq_len", "train_on", "too_long", "empty_response", "bad_rows", "parse_control_tokens")
LIBRARIES = ("tokenizers", "sentencepiece", "jinja2")
# The counts that are listed after all others.
TOTALS = ("kept", "tokens", "trained tokens")


def prepare_store(sources: list[Source], tok: Tokenizer, template: str, data: DataConfig) -> TokenStore:
    """The rows of all `sources` in order, rendered by `template` (a resolved name); the store is built if needed.

    Raises:
        UserError: a source or row that is invalid, a source of which no row is left, a directory that cannot be
            written.
    """
    root = user_path(data.store) if data.store else cache_directory("rows", "data.store")
    readers = [open_source(source, data.limit) for source in sources]
    name = _fingerprint(readers, tok, template, data)
    directory = root / name
    store = open_store(directory)
    if store is None:
        with _locked(directory):
            # Another process may have built it while this one waited.
            store = open_store(directory)
            if store is None:
                store = _build(directory, readers, tok, template, data)
    # The sources may have moved since the store was built; messages name where they are now.
    located = [
        stored._replace(path=reader.path, files=tuple((file.path, file.unit) for file in reader.files))
        for stored, reader in zip(store.sources, readers)
    ]
    return replace(store, sources=located)


def _fingerprint(readers: list[SourceReader], tok: Tokenizer, template: str, data: DataConfig) -> str:
    """The name of the directory: a hash of everything that determines the rows."""
    files = tokenizer_paths(tok.path) | {name: find_file(tok.path, name) for name in MODEL_FILES}
    # Installed only where a model needs it.
    optional = ["mistral-common"] if tok.file.name == "tekken.json" else []
    key = {
        "format": FORMAT,
        "renderer": RENDERER_VERSION,
        "libraries": [importlib.metadata.version(library) for library in (*LIBRARIES, *optional)],
        "sources": [reader.identity() for reader in readers],
        "tokenizer": {name: sha256(path) for name, path in files.items() if path},
        "template": template,
        "settings": {name: getattr(data, name) for name in SETTINGS},
    } | ({"new tokens": tok.new_tokens} if tok.new_tokens else {})
    if readers[0].source.format == "preference":
        key["pairs"] = data.pairs
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Holds the lock of a store. Waits while another process holds it, in short sleeps that signals can interrupt."""
    path = directory.with_name(f"{directory.name}.lock")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot be written ({error}); set data.store to another directory", path=directory.parent
        ) from None
    logged = False
    while (file := lock(path)) is None:
        # The holder writes its name just after it has taken the lock.
        if not logged and (holder := path.read_text().strip()):
            log.info("waiting for %s, which renders the same rows", holder)
            logged = True
        time.sleep(0.1)
    with file:
        yield


def _build(directory: Path, readers: list[SourceReader], tok: Tokenizer, template: str, data: DataConfig) -> TokenStore:
    # What is left of killed builds, and a damaged store.
    remove_unfinished(directory, STORE_FILES)

    def write(temporary: Path) -> None:
        _write_store(temporary, readers, tok, template, data)
        if _fingerprint(readers, tok, template, data) != directory.name:
            paths = ", ".join(reader.path for reader in readers)
            raise UserError("changed while being read; start again", path=paths)

    publish(directory, write)
    store = open_store(directory)
    if store is None:
        raise UserError("was damaged while being written; start again", path=directory)
    return store


def _write_store(directory: Path, readers: list[SourceReader], tok: Tokenizer, template: str, data: DataConfig) -> None:
    """Renders all rows into a directory."""
    tallies = [Tally() for _ in readers]
    token_type = ""
    with ExitStack() as stack:
        # Sources are all of format preference or none is.
        trees = BRANCH_TYPES if readers[0].source.format == "preference" else {}
        files = {name: stack.enter_context((directory / f"{name}.bin").open("wb")) for name in (*ARRAYS, *trees)}
        # Where the rows of a chunk go on.
        ends = {name: 0 for name in ("offsets", "branch_offsets") if name in files}
        for name in ends:
            np.zeros(1, np.int64).tofile(files[name])
        counts = [tally.counts for tally in tallies]
        chunks = stack.enter_context(closing(render_sources(readers, tok, template, data, counts)))
        bar = stack.enter_context(progress_bar("rendering", unit="rows"))
        for n, chunk, tally in chunks:
            tallies[n].update(tally)
            if tally.broken:
                break
            for name in files if len(chunk) else ():
                array = getattr(chunk, name)
                if name in ends:
                    array = array[1:] + ends[name]
                    ends[name] = int(array[-1])
                array.tofile(files[name])
            token_type = chunk.tokens.dtype.name
            bar.update(len(chunk))
    raise_errors(tallies)
    finish_store(directory, token_type, _describe_sources(readers, tallies))


def _describe_sources(readers: list[SourceReader], tallies: list[Tally]) -> list[dict]:
    """What meta.json says of each source: its place, format, range of rows, counts, and what is said beside these."""
    described = []
    start = 0
    for reader, tally in zip(readers, tallies):
        names = ["read", *sorted(tally.counts.keys() - {"read", *TOTALS}), *TOTALS]
        listed = {name: tally.counts[name] for name in names if tally.counts[name]}
        notes = tally.notes
        if "kept" not in listed:
            counts = summarize(listed, notes) or "the source is empty"
            raise UserError(f"no row is left to use ({counts})", path=reader.path)
        end = start + listed["kept"]
        described.append(
            {
                "path": reader.path,
                "format": reader.source.format,
                "rows": (start, end),
                "counts": listed,
                "notes": notes,
            }
        )
        start = end
    return described
