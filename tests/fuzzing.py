"""`python fuzzing.py DIRECTORY FIRST COUNT [READER...]`: reads broken files, COUNT cases from seed FIRST on.

Each case is a copy of a reader's valid files with one of them changed. The reader must succeed or raise UserError,
soon, in little memory, and without opening anything outside the directory; whatever else it does is printed and makes
exit status 1. test_hostile.py runs this in processes of its own, so that a native crash is noticed: the last line names
the case that was running.
"""

import contextlib
import csv
import faulthandler
import io
import json
import os
import random
import resource
import shutil
import struct
import sys
import time
import traceback
import zipfile
from collections import Counter
from pathlib import Path

from minorca.files.atomic import write_manifest

ROOT = Path(__file__).parent.parent
# The limits of one case in time, in memory beyond what the libraries take, and in what of that it touches.
MAX_SECONDS = 20
MAX_MEMORY = 2 * 2**30
MAX_TOUCHED = 2**29
TEXT = "Hello <s>[INST] the quick brown fox\n日本語 🦜 <|im_end|> \x00"
MESSAGES = [
    {"role": "user", "content": "the quick"},
    {"role": "assistant", "content": "brown fox"},
    {"role": "user", "content": TEXT},
]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + eos_token }}{% endfor %}"
    "{{ bos_token }}"
)

# ---------------------------------------------------------------------------------------------------- valid files


def make(directory: Path) -> None:
    """One directory of valid files for each of READERS."""
    from tests.files.test_weights import as_bin, as_bin_shards, as_consolidated
    from tests.helpers import random_adapter, random_mistral

    base = random_mistral(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1)
    for name, convert in {
        "hf": None,
        "shards": None,
        "bin": as_bin,
        "bin_shards": as_bin_shards,
        "consolidated": as_consolidated,
    }.items():
        base.save_pretrained(directory / name, max_shard_size="3KB" if name == "shards" else "5GB")
        if convert:
            convert(directory / name)
    _four_bits(directory / "four_bits")
    _gguf(directory / "gguf")
    for name, save in {"tokenizer": _json_tokenizer, "sentencepiece": _sentencepiece}.items():
        (directory / name).mkdir()
        save(directory / name, {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": TEMPLATE})
        (directory / name / "config.json").write_text('{"bos_token_id": 1, "eos_token_id": [2]}')
        (directory / name / "special_tokens_map.json").write_text('{"bos_token": "<s>", "unk_token": "<unk>"}')
        (directory / name / "chat_template.jinja").write_text(TEMPLATE)
    random_adapter(base, directory / "adapter", ("q", "v", "down"))
    (directory / "adapter" / "README.md").unlink(missing_ok=True)
    _checkpoint(directory / "checkpoint", directory / "adapter")
    _rows(directory)


def _four_bits(home: Path) -> None:
    from minorca.export.huggingface import export
    from minorca.model.quantization import Quantization
    from tests.helpers import random_mistral

    unquantized = home.with_name("unquantized")
    random_mistral(vocab_size=32, intermediate_size=64, num_hidden_layers=1).save_pretrained(unquantized)
    with contextlib.redirect_stdout(io.StringIO()):
        export(unquantized, None, home, Quantization())
    shutil.rmtree(unquantized)
    # what lies beside the weights is of other readers
    for file in home.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()


def _gguf(home: Path) -> None:
    from minorca.export.gguf import export_gguf
    from tests.helpers import random_mistral, save_tokenizer

    model, written = home.with_name("hf of gguf"), home.with_name("gguf written")
    random_mistral(vocab_size=258, hidden_size=32, intermediate_size=32, num_hidden_layers=1).save_pretrained(model)
    save_tokenizer(model)
    with contextlib.redirect_stdout(io.StringIO()):
        export_gguf(model, None, written, "q4_0")
    home.mkdir()
    (written / "model-Q4_0.gguf").rename(home / "model.gguf")
    for directory in (model, written):
        shutil.rmtree(directory)


def _json_tokenizer(home: Path, config: dict) -> None:
    from tests.data.test_tokenizer import byte_level

    byte_level(home, tokenizer_config=config)


def _sentencepiece(home: Path, config: dict) -> None:
    import sentencepiece

    model, sentences = io.BytesIO(), ["the quick brown fox", "jumps over the lazy dog", "naïve 日本語"]
    options = {"vocab_size": 320, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sentences), model_writer=model, **options)
    (home / "tokenizer.model").write_bytes(model.getvalue())
    (home / "tokenizer_config.json").write_text(
        json.dumps(config | {"added_tokens_decoder": {"321": {"content": "<|im_start|>"}}})
    )
    (home / "added_tokens.json").write_text('{"<|im_end|>": 320}')


def _checkpoint(home: Path, adapter: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(adapter, home)
    tensors = load_file(home / "adapter_model.safetensors")
    moments = {f"{moment}.{name}": t.clone() for moment in ("exp_avg", "exp_avg_sq") for name, t in tensors.items()}
    save_file(moments, home / "optimizer.safetensors")
    (home / "state.json").write_text(
        '{"format": 1, "step": 5, "updates": 5, "ranks": 1, "threads": 1, "torch": "2.13", "run": {"lora.rank": 4}}'
    )
    write_manifest(home)


def _rows(directory: Path) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    # One question by all its names, as format preference wants it.
    asked = dict.fromkeys(("question", "instruction", "prompt"), "the quick, brown")
    texts = {"id": "t0", "system_prompt": "Be brief.", "response": "fox\njumps", "text": "A text."} | asked
    texts |= {"input": "", "output": "Gone", "completion": "Said", "label": "true"}
    pair = {"chosen": "fox", "rejected": "dog", "chosen_score": "2", "rejected_score": "1.5"}
    lists = {
        "messages": MESSAGES[:2],
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho", "weight": 0}],
    }
    whole = {name: [{"role": "user", "content": asked["prompt"]}, MESSAGES[1]] for name in ("chosen", "rejected")}
    answers = {"completions": [{"response": "fox", "overall_score": 5}, {"text": "dog", "score": 1.5}]}
    for suffix in ("jsonl", "csv", "parquet"):
        (directory / suffix).mkdir()
    (directory / "jsonl" / "rows.jsonl").write_text(
        "".join(json.dumps(texts | lists | more) + "\n" for more in (pair, whole, answers, {}, pair | {"id": "t1"}))
    )
    with (directory / "csv" / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([(texts | pair).keys(), *([(texts | pair).values()] * 4)])
    write_table(pyarrow.Table.from_pylist([texts | lists | pair] * 5), directory / "parquet" / "rows.parquet")


def _load(directory: Path) -> None:
    import torch

    from minorca import load_model

    load_model(directory, torch.float32, "cpu")


def _load_gguf(directory: Path) -> None:
    """With the files that it stands for in its own directory: nothing is written outside."""
    import torch

    from minorca import load_model
    from minorca.files import gguf_directory
    from minorca.files.gguf import GGUF

    for name, content in gguf_directory.model_files(GGUF(directory / "model.gguf")).items():
        (directory / Path(name).name).write_bytes(content)
    gguf_directory.gguf_directory = lambda path: path.parent
    load_model(directory / "model.gguf", torch.float32, "cpu")
    _tokenize(directory)


def _load_adapter(directory: Path) -> None:
    import torch

    from minorca import load_model

    load_model(directory.parent / "base", torch.float32, "cpu", adapter=directory)


def _tokenize(directory: Path) -> None:
    from minorca import load_tokenizer, render_chat

    tok = load_tokenizer(directory)
    ids = tok.encode(TEXT, bos=True, eos=True)
    tok.decode([*ids, *range(min(tok.vocab_size, 2000))])
    tok.encode_template(TEXT)
    render_chat(tok, MESSAGES)


def _resume(directory: Path) -> None:
    from minorca.files.adapters import read_adapter_settings
    from minorca.files.tensor_files import open_safetensors
    from minorca.train import checkpoint

    checkpoint.verify(directory)
    read_adapter_settings(directory)
    open_safetensors(directory / "optimizer.safetensors")


def _read_rows(directory: Path) -> None:
    """Reads the rows in every format; raises the first error."""
    from typing import get_args

    from minorca import UserError
    from minorca.config import Format, Source
    from minorca.data.sources import open_source, read_rows

    errors = []
    for format in get_args(Format):
        if directory.name == "csv" and format in ("sharegpt", "messages"):
            continue
        try:
            reader = open_source(Source(str(directory / f"rows.{directory.name}"), format), None)
            reader.identity()
            for row in read_rows(reader, 1000, Counter()):
                if isinstance(row, UserError):
                    raise row
        except UserError as error:
            errors.append(error)
    if errors:
        raise errors[0]


READERS = {
    "hf": _load,
    "shards": _load,
    "bin": _load,
    "bin_shards": _load,
    "consolidated": _load,
    "four_bits": _load,
    "gguf": _load_gguf,
    "tokenizer": _tokenize,
    "sentencepiece": _tokenize,
    "adapter": _load_adapter,
    "checkpoint": _resume,
    "jsonl": _read_rows,
    "csv": _read_rows,
    "parquet": _read_rows,
}

# Readers whose files are not replaced by links and pipes: users name a data file themselves, and may name anything.
UNREPLACED = ("jsonl", "csv", "parquet")

# -------------------------------------------------------------------------------------------------------- changes

NUMBERS = [0, 1, 7, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
WORDS = [
    b"null",
    b"true",
    b"1e999",
    b"-1",
    b"NaN",
    b"Infinity",
    b"9" * 30,
    b"9" * 5000,
    b'"',
    b"\\ud800",
    b"../../etc/passwd",
    b"\n",
    b"/etc/passwd",
    b"\x00",
    b"\x1b[31m",
    b"{}",
    b"[]",
    b"[" * 3000,
    b"{% for i in range(99999) %}",
    b"{{ ''.__class__ }}",
    b"{{ 'a' * 9999999999 }}",
]
PICKLES = [
    b"cos\nsystem\n(X\x0c\x00\x00\x00touch canarytR.",
    b"\x80\x02c__builtin__\nbytearray\n\x8a\x08" + b"\xff" * 7 + b"\x7f\x85R.",
]
VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    2**31,
    2**63,
    10**30,
    -(10**30),
    1.5,
    1e308,
    -1e308,
    "",
    "a",
    "\ud800",
    "\x00",
    "\x1b[31m",
    "a" * 100000,
    "../../etc/passwd",
    "/etc/passwd",
    "model.safetensors",
    [],
    {},
    [[]],
    [None],
    [{}],
    {"a": {}},
    [1, 2],
    {"content": 3},
    {"content": []},
]


def flip(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice((1, 1, 2, 8))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def cut(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def remove(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data))
    del data[start : start + draw.choice((1, 2, 8, 100))]


def repeat(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data))
    data[start:start] = data[start : start + draw.choice((1, 8, 60, 1000))] * draw.choice((1, 2, 50))


def splice(data: bytearray, draw: random.Random) -> None:
    start, number = draw.choice((0, 8, draw.randrange(len(data)))), draw.choice(NUMBERS)
    what = draw.choice([draw.choice(WORDS), str(number).encode(), struct.pack("<Q", number), draw.randbytes(8)])
    data[start : start + draw.choice((0, 0, len(what)))] = what


def _nodes(value, found: list) -> list:
    """Every (container, key) within a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found.append((value, key))
        _nodes(value[key], found)
    return found


def change_json(data: bytes, draw: random.Random) -> bytes:
    """Valid JSON with other values, without some, or with a key twice."""
    root = json.loads(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        nodes = _nodes(root, [])
        if not nodes:
            break
        container, key = draw.choice(nodes)
        if draw.random() < 0.2:
            del container[key]
        else:
            values = [other.get(at) for other, at in nodes if isinstance(other, dict)] if draw.random() < 0.2 else []
            value = draw.choice(values or [draw.choice(VALUES), draw.choice(VALUES), draw.choice(NUMBERS)])
            # A copy: the value may contain the container.
            container[key] = json.loads(json.dumps(value))
    text = json.dumps(root)
    if draw.random() < 0.1 and text.startswith('{"'):
        text = '{"' + text.split('"')[1] + '": 1, ' + text[1:]
    return text.encode(errors="surrogatepass")


def change_header(data: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose header is valid JSON, with wrong values."""
    size = int.from_bytes(data[:8], "little")
    header = change_json(data[8 : 8 + size], draw)
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def change_pickle(data: bytes, draw: random.Random) -> bytes:
    """A .bin whose pickle is changed within an intact archive, or is a program."""
    out = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if draw.random() < 0.1 else zipfile.ZIP_STORED
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(out, "w", kind) as copy:
        for record in archive.infolist():
            content = archive.read(record)
            if record.filename.endswith("data.pkl"):
                content = draw.choice(PICKLES) if draw.random() < 0.1 else change_bytes(content, draw)
            copy.writestr(record.filename, content)
    return out.getvalue()


def change_bytes(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        if changed:
            draw.choice((flip, flip, cut, remove, repeat, splice, splice))(changed, draw)
    return bytes(changed)


def replace(file: Path, draw: random.Random) -> None:
    """Replaces a file by a link out, a loop, a pipe, a directory, nothing, an empty file, or another of the files."""
    others = [other for other in sorted(file.parent.iterdir()) if other != file]
    what = draw.choice(("out", "loop", "pipe", "directory", "gone", "empty", "other", "other"))
    file.unlink()
    if what == "out":
        file.symlink_to("/etc/passwd" if draw.random() < 0.5 else "../../outside")
    elif what == "loop":
        file.symlink_to(file.name)
    elif what == "pipe":
        os.mkfifo(file)
    elif what == "directory":
        file.mkdir()
    elif what == "empty":
        file.touch()
    elif what == "other" and others:
        shutil.copy(draw.choice(others), file)


def change(directory: Path, draw: random.Random) -> str:
    """Changes one file of a directory; returns its name."""
    file = draw.choice(sorted(directory.iterdir()))
    if draw.random() < 0.1 and directory.name not in UNREPLACED:
        replace(file, draw)
        return file.name
    data = file.read_bytes()
    by_kind = {".json": change_json, ".safetensors": change_header, ".bin": change_pickle}.get(
        file.suffix, change_bytes
    )
    file.write_bytes(draw.choice((change_bytes, by_kind, by_kind))(data, draw))
    has_manifest = (directory / "MANIFEST.json").exists() and file.name != "MANIFEST.json"
    if has_manifest and draw.random() < 0.7:
        # Whoever makes a file also makes its checksum.
        (directory / "MANIFEST.json").unlink()
        write_manifest(directory)
    return file.name


# ---------------------------------------------------------------------------------------------------------- watch

# The case's directory while its reader runs, and the forbidden things that it did.
inside: str | None = None
violations: list[str] = []
LIBRARIES = tuple(os.path.realpath(one) for one in (sys.prefix, sys.base_prefix, ROOT / "minorca", ROOT / "kernels"))
FORBIDDEN = (
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "os.fork",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.symlink",
    "os.link",
    "socket.",
    "shutil.",
    "ctypes.dlopen",
)


def watch(event: str, arguments: tuple) -> None:
    if inside is None:
        return
    if event == "open" and isinstance(arguments[0], str | bytes):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        flags = arguments[2]
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        allowed = (inside,) if writes else (inside, *LIBRARIES, "/dev/null", "/proc/")
        if not (path + "/").startswith(tuple(allowed)) and path not in allowed:
            violations.append(f"opened {path}")
    elif event == "subprocess.Popen":
        if not str(arguments[1][-1]).endswith("minorca/data/sandbox.py"):
            violations.append(f"started {arguments[1]}")
    elif event.startswith(FORBIDDEN) and not violations:
        violations.append(f"{event} {arguments}"[:300])


def run(directory: Path, first: int, count: int, names: list[str]) -> int:
    global inside
    from minorca import UserError
    from tests.files.hostile_files import peak_memory

    cases = directory / "cases"
    failures = 0
    outcomes = Counter()
    shutil.rmtree(cases, ignore_errors=True)
    cases.mkdir()
    # What is imported and read once is so before anything is watched or limited.
    for name in names:
        READERS[name](_case(directory, cases / "warm", name))
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MAX_MEMORY, taken + MAX_MEMORY))
    sys.addaudithook(watch)
    for seed in range(first, first + count):
        draw = random.Random(seed)
        name = names[seed % len(names)]
        case = _case(directory, cases / str(seed), name)
        file = change(case, draw)
        print(f"seed {seed}: {name}, {file}", flush=True)
        faulthandler.dump_traceback_later(MAX_SECONDS, exit=True)
        # Resets the peak.
        Path("/proc/self/clear_refs").write_text("5")
        began, before = time.monotonic(), peak_memory()
        wrong = None
        inside = str(cases)
        try:
            READERS[name](case)
            outcomes[f"{name}: read"] += 1
        except UserError as error:
            outcomes[f"{name}: refused"] += 1
            if len(str(error)) > 5000 and name not in UNREPLACED:
                wrong = f"a message of {len(str(error))} characters"
        except BaseException as error:
            origin = traceback.extract_tb(error.__traceback__)[-1]
            wrong = f"{type(error).__name__}: {str(error)[:200]!r} at {origin.filename}:{origin.lineno}"
        inside = None
        faulthandler.cancel_dump_traceback_later()
        if violations:
            wrong = "; ".join(violations)
            violations.clear()
        took = time.monotonic() - began
        if took > MAX_SECONDS / 2:
            wrong = f"{took:.0f} seconds"
        if (touched := peak_memory() - before) > MAX_TOUCHED:
            wrong = f"{touched} bytes"
        if wrong:
            failures += 1
            print(f"FAILED seed {seed}: {name}, {file}: {wrong}", flush=True)
        shutil.rmtree(cases / str(seed))
    print(f"{count} cases, {failures} failed: {dict(sorted(outcomes.items()))}", flush=True)
    return int(failures > 0)


def _case(directory: Path, case: Path, name: str) -> Path:
    """A copy of a reader's files to change, and for an adapter a copy of its base model."""
    if name == "adapter":
        shutil.copytree(directory / "hf", case / "base")
    return shutil.copytree(directory / name, case / name)


if __name__ == "__main__":
    root = Path(sys.argv[1]).resolve()
    if not root.exists():
        make(root)
    sys.exit(run(root, int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:] or list(READERS)))
