"""Small files that ask for much memory or time, and what reading each one took. test_hostile.py asserts it."""

import base64
import io
import json
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import sentencepiece

from minorca import UserError, load_tokenizer
from tests.data.test_tokenizer import byte_level

# Seldom: in none of the texts that tokenizers are tried with.
RARE = "\u4321"


def replace(pattern: str, content: str, kind: str = "String") -> dict:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def chain(part: str, steps: list[dict]) -> dict:
    """A part of a tokenizer.json that is a sequence of steps."""
    plural = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}[part]
    return {part: {"type": "Sequence", plural: steps}}


def template(pieces: int, ids: int, text: int = 1) -> dict:
    """A post-processor of so many special tokens, each of so many ids, around the text so many times."""
    special, sequence = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 0}}
    tokens = {"<s>": {"id": "<s>", "ids": [1] * ids, "tokens": ["<s>"] * ids}}
    single = [special] * pieces + [sequence] * text
    post = {"type": "TemplateProcessing", "single": single, "pair": [sequence, second], "special_tokens": tokens}
    return {"post_processor": post}


def charsmap_model(rule: str, which: str = "normalization", directory: Path = Path()) -> bytes:
    """A tokenizer.model with one rule of a table, as SentencePiece's trainer writes it."""
    rules = directory / "rules.tsv"
    rules.write_text(rule + "\n")
    model = io.BytesIO()
    options = {"vocab_size": 64, "model_type": "bpe", "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"]),
        model_writer=model,
        **{f"{which}_rule_tsv": str(rules)},
        **options,
    )
    rules.unlink()
    return model.getvalue()


def long_rule(*characters: str) -> str:
    return " ".join(f"{ord(one):X}" for one in characters) + "\t" + " ".join(["78"] * 20_000)


def tokenizer_json(change: dict) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        file = byte_level(directory) / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))

    return make


def tokenizer_model(rule: str, which: str = "normalization") -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        (directory / "tokenizer.model").write_bytes(charsmap_model(rule, which, directory))

    return make


def precompiled(directory: Path) -> None:
    """The table of such a tokenizer.model in a tokenizer.json."""
    from minorca.data.tokenizer_probe import _fields

    (specification,) = _fields(charsmap_model(long_rule(RARE), directory=directory), 3)
    (table,) = _fields(specification, 2)
    normalizer = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}
    tokenizer_json({"normalizer": normalizer})(directory)


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
TOKENIZERS: dict[str, Callable[[Path], None]] = {
    "22 pre-tokenizers by bytes": tokenizer_json(chain("pre_tokenizer", [BYTES] * 22)),
    "22 normalizers by bytes": tokenizer_json(chain("normalizer", [{"type": "ByteLevel"}] * 22)),
    "nested sequences": tokenizer_json(
        chain("pre_tokenizer", [chain("pre_tokenizer", [BYTES] * 6)["pre_tokenizer"]] * 4)
    ),
    "what is replaced doubles": tokenizer_json(chain("normalizer", [replace(RARE, RARE * 2)] * 40)),
    "a step undoes it": tokenizer_json(chain("normalizer", [replace(RARE, RARE * 2)] * 25 + [replace(RARE, "")])),
    "an expression doubles": tokenizer_json(chain("normalizer", [replace(RARE, RARE * 2, "Regex")] * 25)),
    "an empty match doubles": tokenizer_json(chain("normalizer", [replace(f"(?={RARE})", RARE, "Regex")] * 25)),
    "a decoder doubles": tokenizer_json(chain("decoder", [replace(RARE, RARE * 2)] * 40)),
    "a step removes it from texts of words": tokenizer_json(
        chain(
            "normalizer",
            [replace("\u2003", "\u2003\u2003"), {"type": "Strip", "strip_left": True, "strip_right": True}] * 24,
        )
    ),
    "an expression removes it from texts of itself": tokenizer_json(
        chain("normalizer", [replace(RARE, RARE * 2), replace(f"^{RARE}+$", "", "Regex")] * 20)
    ),
    "an expression, and what it writes": tokenizer_json(
        chain("normalizer", [replace(RARE, "q" * 90, "Regex"), replace("q", "z" * 90)])
    ),
    "texts of two replacements": tokenizer_json(
        chain("normalizer", [replace("..", ".-" * 8), replace("-.", "." * 16)] * 2)
    ),
    "bytes after what removes the sample": tokenizer_json(
        chain("normalizer", [replace(r"[\s\S]*The quick[\s\S]*", "", "Regex"), *[{"type": "ByteLevel"}] * 12])
    ),
    "ignoring case, one for two": tokenizer_json(chain("normalizer", [replace("(?i)ss", "ß" * 20, "Regex")] * 2)),
    "a decoder that removes it from texts of itself": tokenizer_json(
        chain("decoder", [replace(RARE, RARE * 2), replace(f"^{RARE}+$", "", "Regex")] * 20)
    ),
    "words of any length": tokenizer_json(
        {
            "model": {
                "type": "WordPiece",
                "vocab": {"b": 0, "##b": 1},
                "unk_token": "b",
                "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 10**9,
            }
        }
    ),
    "a long beginning": tokenizer_json({"normalizer": {"type": "Prepend", "prepend": "x" * 10**6}}),
    "1000 special tokens of 1000 ids": tokenizer_json(template(1000, 1000)),
    "the text 2000 times": tokenizer_json(template(0, 1, text=2000)),
    "20,000 characters for one": tokenizer_model(long_rule(RARE)),
    "20,000 characters for two": tokenizer_model(long_rule("q", RARE)),
    "20,000 characters of text for one": tokenizer_model(long_rule("q"), "denormalization"),
    "20,000 characters for one, in JSON": precompiled,
}


class Taken(NamedTuple):
    """What a read took: the error that ended it, seconds, and bytes beyond what the process had at its peak."""

    said: str
    seconds: float
    bytes: int


def measure(read: Callable[[Path], object], directory: Path) -> Taken:
    """Reads a directory in a process of its own."""
    out, into = os.pipe()
    if (child := os.fork()) == 0:
        began, before = time.monotonic(), peak_memory()
        try:
            said = f"no error: {read(directory)!r}"[:100]
        except UserError as error:
            said = str(error)
        except BaseException as error:
            said = f"not a UserError: {error!r}"
        os.write(into, pickle.dumps((said, time.monotonic() - began, peak_memory() - before)))
        os._exit(0)
    os.close(into)
    with open(out, "rb") as pipe:
        reply = pipe.read()
    status = os.waitpid(child, 0)[1]
    return Taken(*pickle.loads(reply)) if reply else Taken(f"ended with status {status}", 0, 0)


def peak_memory() -> int:
    """The largest resident set of this process so far, in bytes; a forked process begins with what it has."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def encode_rare(directory: Path) -> int:
    """Loads a tokenizer and uses it as an attacker would."""
    tok = load_tokenizer(directory)
    return len(tok.encode(RARE * 1000)) + len(tok.decode(tok.encode(RARE)))


# ------------------------------------------------------------------------------------------------------------- rows


def table(columns: Callable[[], Any], suffix: str = "parquet", **options: Any) -> Callable[[Path], Path]:
    """A table of these columns, or of the column `question`, as Arrow makes it."""

    def make(directory: Path) -> Path:
        from pyarrow.parquet import write_table

        path = directory / f"rows.{suffix}"
        made = columns()
        content = pyarrow.table(made if isinstance(made, dict) else {"question": made})
        if suffix == "arrow":
            with pyarrow.ipc.new_file(path, content.schema) as file:
                file.write_table(content)
        else:
            # Without the schema a reader knows of no dictionaries.
            options.setdefault("compression", "zstd")
            write_table(content, path, store_schema=False, **options)
        return path

    return make


def number(value: int, length: int = 0) -> bytes:
    """A number as parquet's metadata have it, in so many bytes."""
    return varint(2 * value ^ value >> 63, length)


def varint(value: int, length: int = 0) -> bytes:
    digits = [value >> shift & 127 for shift in range(0, 70, 7)]
    while len(digits) > max(1, length) and digits[-1] == 0:
        digits.pop()
    return bytes([digit | 128 for digit in digits[:-1]] + digits[-1:])


def forged(make: Callable[[Path], Path], says: int, of: Callable[[Any], int], page: bool = False) -> Callable:
    """A parquet file whose footer, or whose first page's header, has another number than that of the first column."""

    def forge(directory: Path) -> Path:
        from pyarrow.parquet import read_metadata

        path = make(directory)
        content, chunk = path.read_bytes(), read_metadata(path).row_group(0).column(0)
        start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
        head, tail = content[:start], content[start:]
        old = number(of(chunk))
        new = number(says, len(old))
        changed = head.replace(old, new, 1) + tail if page else head + tail.replace(old, new)
        assert changed != content and len(changed) == len(content)
        path.write_bytes(changed)
        return path

    return forge


def lengths_of_texts(directory: Path) -> Path:
    """A page of 1000 texts in DELTA_BYTE_ARRAY, whose own lengths are those of 300 million."""
    from pyarrow.parquet import read_metadata, write_table

    path = directory / "rows.parquet"
    schema = pyarrow.schema([pyarrow.field("question", pyarrow.string(), nullable=False)])
    options = {"compression": "none", "store_schema": False, "write_statistics": False}
    write_table(pyarrow.table({"question": ["a"] * 1000}, schema=schema), path, **DELTA, **options)
    chunk = read_metadata(path).row_group(0).column(0)
    # One block of numbers of no bits: its size, its one part, how many numbers, the first and the least, then the bits.
    numbers = b"".join(varint(value) for value in (2**30, 1, 3 * 10**8, 0, 0)) + b"\0"
    size = number(2 * len(numbers))
    header = b"\x15\0\x15" + size + b"\x15" + size + b"\x2c\x15" + number(1000) + b"\x15\x0e\x15\6\x15\6\0\0"
    page = (header + numbers * 2).ljust(chunk.total_compressed_size, b"\0")
    content = path.read_bytes()
    path.write_bytes(content[:4] + page + content[4 + len(page) :])
    return path


def repeated(count: int, text: str = "x" * 900_000) -> pyarrow.Array:
    """A text so many times, stored once."""
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count, pyarrow.int32()), [text])


def lists(items: pyarrow.Array, rows: int) -> pyarrow.Array:
    """As many items for each row."""
    return pyarrow.ListArray.from_arrays([n * len(items) // rows for n in range(rows + 1)], items)


def views(count: int) -> pyarrow.Array:
    """So many views of one text of a megabyte."""
    _, places, content = pyarrow.array(["x" * 10**6], pyarrow.string_view()).buffers()
    places = pyarrow.py_buffer(places.to_pybytes()[:16] * count)
    return pyarrow.Array.from_buffers(pyarrow.string_view(), count, [None, places, content])


def messages(count: int) -> pyarrow.Array:
    return pyarrow.StructArray.from_arrays([repeated(count, "user"), repeated(count)], ["role", "content"])


def map_items(count: int) -> pyarrow.Array:
    keys = pyarrow.array(map(str, range(count)))
    return pyarrow.MapArray.from_arrays([0, count], keys, repeated(count))


def text(name: str, *blocks: tuple[str, int]) -> Callable[[Path], Path]:
    """A compressed text of blocks, each so many times."""

    def make(directory: Path) -> Path:
        path = directory / name
        with pyarrow.output_stream(str(path), compression="detect") as file:
            for block, count in blocks:
                for _ in range(count):
                    file.write(block.encode())
        return path

    return make


MEGABYTE = "x" * 10**6
LARGE_PAGE = table(lambda: ["x" * 9 * 10**7], use_dictionary=False, write_statistics=False)
LARGE_ENTRY = table(lambda: repeated(2, "x" * 9 * 10**7), write_statistics=False)
NUMBERS = table(lambda: lists(pyarrow.array([1]).take(pyarrow.array([0] * 10**7)), 1), write_statistics=False)
# Each text as how much of the last one it begins with, and its rest.
DELTA = {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY", "data_page_size": 10**9}
ROWS: dict[str, Callable[[Path], Path]] = {
    "a text for thousands of rows": table(lambda: repeated(2000)),
    "a text for thousands of messages": table(lambda: lists(messages(20_000), 200)),
    "a text for all messages of one row": table(lambda: lists(messages(5000), 1), compression="gzip"),
    "a text for all items of a map": table(lambda: map_items(5000)),
    "a large page": LARGE_PAGE,
    "bytes of one length": table(lambda: pyarrow.array([b"x" * 10**6] * 300, pyarrow.binary(10**6))),
    "many numbers": NUMBERS,
    "many nulls": table(lambda: lists(pyarrow.nulls(10**7, pyarrow.int64()), 1)),
    "a large page that the footer hides": forged(LARGE_PAGE, 200, lambda chunk: chunk.total_uncompressed_size),
    "a large entry that the footer hides": forged(LARGE_ENTRY, 200, lambda chunk: chunk.total_uncompressed_size),
    "numbers that the footer hides": forged(NUMBERS, 1, lambda chunk: chunk.num_values),
    "beginnings of a text": table(lambda: ["x" * 10**6] * 90, **DELTA),
    "beginnings of a text in lists": table(lambda: lists(pyarrow.array(["x" * 10**6] * 90), 1), **DELTA),
    "a dictionary of Arrow's": table(lambda: repeated(2000), "arrow"),
    "views of Arrow's": table(lambda: views(2000), "arrow"),
    "a line": text("rows.jsonl.gz", (MEGABYTE, 90)),
    "a line, by zstd": text("rows.jsonl.zst", (MEGABYTE, 90)),
    "spaces before an array": text("rows.json.gz", (" " * 10**6, 90)),
    "an element of an array": text("rows.json.zst", ('[{"question": "', 1), (MEGABYTE, 90)),
    "a cell": text("rows.csv.gz", ('question,response\n"', 1), (("x" * 999 + "\n") * 1000, 90)),
    "a document": text("rows.txt.gz", (MEGABYTE, 90)),
    "empty lines": text("rows.jsonl.zst", ("\n" * 10**6, 90)),
}
