"""Malicious files: whatever a model's or adapter's directory contains, reading it ends soon, in little memory, with the
right numbers or a UserError, and touches nothing outside. Broken files in general are in the tests of each reader.
"""

import errno
import json
import os
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import torch
from pyarrow.parquet import read_table, write_table
from safetensors.torch import load_file

from minorca import UserError, load_model, load_tokenizer, render_chat
from minorca.data import sandbox, tokenizer_probe
from minorca.data.row_files import drop_null_fields, open_file
from minorca.export.__main__ import export
from minorca.files.adapters import read_adapter_settings
from minorca.files.safe_io import read_json
from minorca.files.tensor_files import open_tensors
from minorca.model.architecture import read_architecture
from tests import fuzzing
from tests.data.test_chat_template import CHATML, turns, with_template
from tests.data.test_tokenizer import byte_level, orca
from tests.files.hostile_files import (
    LARGE_PAGE,
    ROWS,
    TOKENIZERS,
    chain,
    encode_rare,
    forged,
    lengths_of_texts,
    measure,
    replace,
    table,
    tokenizer_json,
)
from tests.files.test_weights import (
    BIN,
    FILE,
    INDEX,
    MISTRAL,
    PARAMS,
    Q0,
    as_bin,
    as_consolidated,
    config_directory,
    edit,
    pointing,
    read,
    write,
)
from tests.helpers import ROOT, random_adapter, random_mistral, save_tokenizer


def load(directory: Path, **options):
    return load_model(directory, torch.float32, "cpu", **options)


def refusal(function, *arguments, **options) -> str:
    """The message of the UserError that a call raises, soon."""
    began = time.monotonic()
    with pytest.raises(UserError) as error:
        function(*arguments, **options)
    # Generous: the machine may be shared.
    assert time.monotonic() - began < 60
    return str(error.value)


# ------------------------------------------------------------------------------------------------------ other places


def a_link_out(path: Path) -> None:
    outside = path.parent.parent / f"outside-{path.name}"
    # A valid file, only in another place.
    path.rename(outside)
    path.symlink_to(f"../{outside.name}")


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


PLACES = {
    a_link_out: "is a symbolic link to .*, outside its directory",
    a_device: "is a symbolic link to /dev/zero, outside its directory",
    a_pipe: "expected a regular file, got",
    a_directory: "expected a regular file, got",
    a_loop: "cannot be read .*loop",
}
# Of each kind of directory: the function that reads it, and files that it reads.
READ = {
    "model": (load, ["config.json", FILE]),
    "shards": (load, [INDEX, "model-00002-of-00006.safetensors"]),
    "bin": (load, [BIN]),
    "native": (load, ["params.json", "consolidated.safetensors"]),
    "tokenizer": (
        load_tokenizer,
        [
            "tokenizer.json",
            "tokenizer_config.json",
            "config.json",
            "generation_config.json",
            "special_tokens_map.json",
            "chat_template.jinja",
        ],
    ),
    "sentencepiece": (load_tokenizer, ["tokenizer.model", "added_tokens.json"]),
    "adapter": (read_adapter_settings, ["adapter_config.json", "adapter_model.safetensors"]),
    "exported": (
        lambda directory: export(directory, None, directory.parent / "out"),
        ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.model.v3"],
    ),
}


@pytest.fixture
def valid(save_mistral, tmp_path):
    """valid(kind) -> a directory whose files READ[kind] reads."""

    def make(kind: str) -> Path:
        directory, model = save_mistral(shard_size="60KB" if kind == "shards" else "5GB")
        if kind == "bin":
            as_bin(directory)
        elif kind == "native":
            as_consolidated(directory)
        elif kind in ("tokenizer", "exported"):
            byte_level(directory, special_tokens_map={}, generation_config={})
            (directory / "chat_template.jinja").write_text(CHATML)
            (directory / "tokenizer.model.v3").write_bytes(b"copied as it is")
        elif kind == "sentencepiece":
            orca(directory)
        elif kind == "adapter":
            random_adapter(model, directory, ("q",))
        return directory

    return make


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("kind, name", [(kind, name) for kind, (_, names) in READ.items() for name in names])
def test_only_regular_files_of_the_directory_are_read(kind, name, place, valid):
    directory, function = valid(kind), READ[kind][0]
    place(directory / name)
    said = refusal(function, directory)
    assert f"{directory / name}" in said
    assert re.search(PLACES[place], said), said
    assert not (directory.parent / "out").exists()


@pytest.mark.parametrize("kind", READ)
def test_links_into_the_caches_blobs_are_followed(kind, valid, tmp_path):
    """models--X/snapshots/REVISION/FILE -> ../../blobs/HASH, but no other link within that cache."""
    directory, cache = valid(kind), tmp_path / "hub" / "models--a--b"
    snapshot, blobs = cache / "snapshots" / "0123", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(directory.iterdir())):
        file.rename(blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    READ[kind][0](snapshot)
    for file in snapshot.iterdir():
        file.resolve().rename(cache / file.resolve().name)
        target = os.readlink(file).replace("blobs/", "")
        file.unlink()
        file.symlink_to(target)
    shutil.rmtree(cache / "snapshots" / "out", ignore_errors=True)
    assert "outside its directory" in refusal(READ[kind][0], snapshot)


def test_a_directory_reached_by_a_link_is_read(save_mistral, tmp_path):
    """A directory may be named by any path: only links within it are untrusted."""
    directory, _ = save_mistral()
    (tmp_path / "link").symlink_to(directory)
    load(tmp_path / "link")


NAMES = [
    "../model.safetensors",
    "/etc/passwd",
    "a\nb.safetensors",
    "a\0b",
    "\x1b[31m.safetensors",
    "\ud800",
    "a" * 300,
    "",
    ".",
    "..",
    3,
    None,
    ["a"],
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_an_index_names_plain_files(name, valid):
    directory = valid("shards")
    pointing(Q0, name)(directory)
    said = refusal(load, directory)
    assert said.startswith(f"{directory / INDEX}: names the file ") and said.isprintable() and len(said) < 1000


def test_an_index_of_safetensors_names_no_pickles(valid):
    directory = valid("shards")
    torch.save({Q0: torch.zeros(64, 64)}, directory / "x.bin")
    pointing(Q0, "x.bin")(directory)
    assert "names the file x.bin; expected one that ends in .safetensors" in refusal(load, directory)


# ---------------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    "text, complaint",
    [
        ('{"a": 1, "b": {"c": 1, "d": 2, "c": 3}}', "duplicate key 'c'"),
        ('{"a": NaN}', "NaN is not a valid JSON number"),
        ('{"a": [-Infinity]}', "-Infinity is not a valid JSON number"),
        ('{"a": 1e999}', "1e999 is not a valid JSON number"),
        ('{"a": %s}' % ("9" * 5000), "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('{"a":' * 100_000, "cannot be read"),
        (b'{"a": "\xff"}', "cannot be read"),
        ('{"%s": 1, "%s": 2}' % (("k" * 10**6,) * 2), "duplicate key"),
    ],
    ids=["twice", "NaN", "infinity", "overflow", "digits", "brackets", "braces", "bytes", "long key"],
)
def test_json_that_parsers_read_differently(text, complaint, tmp_path):
    (tmp_path / "x.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    said = refusal(read_json, tmp_path / "x.json")
    assert said.startswith(f"{tmp_path}/x.json") and complaint in said and len(said) < 1000


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "tokenizer_config.json"]
)
def test_large_files_are_refused_unread(name, valid):
    directory = valid("tokenizer" if name != "tokenizer.model" else "sentencepiece")
    with (directory / name).open("r+b") as file:
        # A sparse file, which takes no room.
        file.truncate(10**13)
    assert f"{directory / name}: has 10000000000000 bytes; expected at most" in refusal(load_tokenizer, directory)


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"vocab_size": 10**18},
        {"hidden_size": 10**400},
        {"intermediate_size": 2**63},
        {"head_dim": 2**20},
        {"num_attention_heads": 2**20, "num_key_value_heads": 1},
        {"hidden_size": 1},
        {"sliding_window": 10**30},
        {"rope_theta": 10**400},
        {"max_position_embeddings": 10**18},
        {"rms_norm_eps": 1e300},
        {"model_type": ["mistral"]},
        {"layer_types": 5},
        {"layer_types": [[]]},
        {"layer_types": {"a": 1}},
        {"rope_parameters": [1]},
        {"vocab_size": [[[]]]},
        {"vocab_size": "x" * 10**6},
    ],
    ids=lambda change: str(change)[:50],
)
def test_numbers_no_model_has(change, tmp_path):
    config_directory(tmp_path, MISTRAL | {"head_dim": None} | change)
    said = refusal(read_architecture, tmp_path)
    assert said.startswith(f"{tmp_path}/config.json: ") and len(said) < 1000


@pytest.mark.parametrize(
    "change",
    [
        {"n_layers": 10**9},
        {"n_heads": 2**19},
        {"sliding_window": "9" * 5000},
        {"sliding_window": [[]]},
        {"norm_eps": 10**400},
    ],
    ids=lambda change: str(change)[:50],
)
def test_numbers_no_model_has_in_mistrals_layout(change, tmp_path):
    config_directory(tmp_path, PARAMS | change, "params.json")
    assert refusal(read_architecture, tmp_path).startswith(f"{tmp_path}/params.json: ")


def test_more_layers_than_tensors(valid):
    directory = valid("model")
    edit(directory / "config.json", num_hidden_layers=4096, layer_types=...)
    assert "holds 21 tensors; the configuration says 4096 layers" in refusal(load, directory)


# --------------------------------------------------------------------------------------------------------- safetensors


def a_file(path: Path, header: bytes | dict, data: bytes = b"", size: int | None = None) -> None:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header) if size is None else size) + header + data)


def entry(begin: int, end: int, shape: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


ONE = entry(0, 4, [1])
# Header, data, declared size.
HEADERS = {
    "huge": ({}, b"", 2**62),
    "largest": ({}, b"", 2**64 - 1),
    "over our limit": ({}, b"", 99 * 10**6),
    "longer than the file": ({"a": ONE}, b"", 1000),
    "no object": (b"5", b"", None),
    "deep": (b"[" * 100_000, b"", None),
    "overlap": ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12), None),
    "hole": ({"a": ONE, "b": entry(8, 12, [1])}, bytes(12), None),
    "negative": ({"a": entry(-4, 0, [1])}, bytes(4), None),
    "backwards": ({"a": entry(4, 0, [1])}, bytes(4), None),
    "beyond": ({"a": entry(0, 400, [100])}, bytes(4), None),
    "surplus": ({"a": ONE}, bytes(8), None),
    "shape": ({"a": entry(0, 4, [2])}, bytes(4), None),
    "overflow": ({"a": entry(0, 4, [2**32, 2**32, 2**32])}, bytes(4), None),
    "negative shape": ({"a": entry(0, 4, [-1, -1])}, bytes(4), None),
    "dtype": ({"a": entry(0, 4, [1], "F33")}, bytes(4), None),
    "twice": (b'{"a": %s, "a": %s}' % ((json.dumps(ONE).encode(),) * 2), bytes(4), None),
    "field twice": (b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', bytes(4), None),
    "control characters": ({"\x1b[2Ja\n": ONE}, bytes(4), None),
    "long name": ({"a" * 10**6: ONE}, bytes(4), None),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie(name, valid):
    directory = valid("model")
    a_file(directory / FILE, *HEADERS[name])
    said = refusal(load, directory)
    assert said.startswith(f"{directory / FILE}: ") and len(said) < 1000 and said.isprintable()


@pytest.mark.parametrize("dtype", ["I8", "U8", "BOOL", "I64", "U16", "F8_E4M3", "F8_E5M2", "C64"])
def test_other_types(dtype, valid):
    directory = valid("model")
    tensors = load_file(directory / FILE)
    size = {"I64": 8, "C64": 8, "U16": 2}.get(dtype, 1)
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = bytes(64 * 64 * size) if name == Q0 else tensor.numpy().tobytes()
        header[name] = entry(len(data), len(data) + len(raw), list(tensor.shape), dtype if name == Q0 else "F32")
        data += raw
    a_file(directory / FILE, header, data)
    assert f"{Q0} is {dtype}" in refusal(load, directory)


# ---------------------------------------------------------------------------------------------------------------- .bin


def test_a_bin_that_asks_for_memory(valid):
    """Without code, and accepted by weights_only: 10^11 bytes, a gigabyte from a megabyte, 2^40 views of one number."""
    directory = valid("bin")
    path = directory / BIN
    state = torch.load(path)

    class Bytes:
        def __reduce__(self):
            return bytearray, (10**11,)

    torch.save(state | {"x": Bytes()}, path)
    assert "cannot be read without running code" in refusal(load, directory)
    torch.save(state | {Q0: torch.zeros(1).expand(2**20, 2**20)}, path)
    assert "its tensors take 4398046807296 bytes, far more than it has" in refusal(load, directory)
    torch.save(state, path)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(directory / "copy", "w", zipfile.ZIP_DEFLATED) as copy:
        for record in archive.infolist():
            copy.writestr(record.filename, archive.read(record))
    (directory / "copy").rename(path)
    assert "cannot be read without running code" in refusal(load, directory)


def rewritten(path: Path, change) -> None:
    """A zip file with other records: `change` gets names and contents and returns pairs of them."""
    with zipfile.ZipFile(path) as archive:
        records = [(record.filename, archive.read(record)) for record in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in change(records):
            with warnings.catch_warnings(action="ignore"):
                archive.writestr(name, content)


def open_bin(path: Path) -> Any:
    return open_tensors(path)


ASKS = b"\x80\x02c__builtin__\nbytearray\n\x8a\x05" + (10**9).to_bytes(5, "little") + b"\x85R."
SHADOWED = {
    "in capitals, instead": lambda records: [(name.replace("data.pkl", "DATA.PKL"), ASKS) for name, _ in records[:1]],
    "in capitals, before": lambda records: [(records[0][0].replace("data.pkl", "DATA.PKL"), ASKS), *records],
    "in capitals, after": lambda records: [*records, (records[0][0].replace("data.pkl", "Data.pkl"), ASKS)],
    "of another archive, before": lambda records: [("other/data.pkl", ASKS), *records],
    "of another archive, after": lambda records: [*records, ("other/data.pkl", ASKS)],
    "twice": lambda records: [*records, (records[0][0], ASKS)],
    "twice, the other first": lambda records: [(records[0][0], ASKS), *records],
    "at the top": lambda records: [("data.pkl", ASKS), *records],
    "in a directory": lambda records: [(f"{records[0][0]}/data.pkl", ASKS), *records],
}


@pytest.mark.parametrize("name", SHADOWED)
def test_a_bin_has_one_reader(name, valid, monkeypatch):
    """Whatever record another reader would take for the pickle: the one that was checked is read, or none."""
    directory = valid("bin")
    expected = torch.load(directory / BIN)
    rewritten(directory / BIN, SHADOWED[name])
    monkeypatch.setattr(torch, "load", None)
    taken = measure(lambda directory: compare(open_bin(directory / BIN), expected), directory)
    assert taken.said == "no error: True" or taken.said.startswith(f"{directory / BIN}: cannot be read"), taken
    assert taken.seconds < 10 and taken.bytes < 100 * 2**20, taken


def compare(tensors: dict, expected: dict) -> bool:
    return tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_a_bins_storages_are_in_their_records(valid):
    """Shared ones are shared; one that would reach beyond its record, or is of another byte order, is refused."""
    path = valid("bin") / BIN
    weight = torch.randn(4, 6, dtype=torch.bfloat16)
    torch.save({"a": weight, "b": weight.T[1:], "c": torch.nn.Parameter(torch.ones(2))}, path)
    tensors = open_bin(path)
    assert torch.equal(tensors["b"], weight.T[1:]) and tensors["b"].stride() == (1, 6)
    assert tensors["a"].untyped_storage().data_ptr() == tensors["b"].untyped_storage().data_ptr()
    for what, change in {
        "larger than its record": lambda name, content: content[:-2] if name.endswith("data/0") else content,
        "little-endian": lambda name, content: b"big" if name.endswith("byteorder") else content,
    }.items():
        torch.save({"a": weight}, path)
        rewritten(path, lambda records, change=change: [(name, change(name, content)) for name, content in records])
        assert what in refusal(open_bin, path)


def test_nothing_else_is_unpickled(valid, tmp_path, monkeypatch):
    """A model in safetensors, its tokenizer and an adapter load and generate without pickle and torch.load."""
    from minorca.generate import generate

    def gone(*arguments, **options):
        raise AssertionError("unpickled")

    directory = valid("model")
    random_adapter(random_mistral(), tmp_path / "adapter", ("q", "v"))
    save_tokenizer(directory)
    (directory / "chat_template.jinja").write_text(CHATML)
    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, gone)
    monkeypatch.setattr(torch, "load", gone)
    tok, model = load_tokenizer(directory), load(directory, adapter=tmp_path / "adapter")
    assert render_chat(tok, turns("Hi"))
    assert len(generate(model, [[1, 2, 3]], max_new_tokens=3)[0]) <= 3


# ------------------------------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize(
    "change",
    [
        {"r": 10**18},
        {"r": 10**400},
        {"lora_alpha": 10**400},
        {"lora_alpha": 1e300},
        {"r": True},
        {"peft_type": ["LORA"]},
        {"init_lora_weights": {}},
        {"use_dora": "x" * 10**6},
    ],
    ids=lambda change: str(change)[:40],
)
def test_adapters_of_impossible_size(change, valid):
    directory = valid("adapter")
    edit(directory / "adapter_config.json", **change)
    said = refusal(read_adapter_settings, directory)
    assert said.startswith(f"{directory}/adapter_config.json: {next(iter(change))} is") and len(said) < 1000


def test_an_adapters_rank_is_its_tensors(valid):
    """Checked before memory is allocated for it."""
    directory = valid("adapter")
    edit(directory / "adapter_config.json", r=2**20)
    assert "has shape [4, 64]; expected [1048576, 64]" in refusal(load, directory, adapter=directory)


# ---------------------------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token": 5},
        {"eos_token": ["<s>"]},
        {"bos_token": {"content": {}}},
        {"eos_token": "\ud800"},
        {"added_tokens_decoder": [1]},
        {"added_tokens_decoder": {"9" * 5000: {"content": "x"}}},
        {"added_tokens_decoder": {"7": {"content": "\ud800"}}},
        {"chat_template": "x" * 10**7},
        {"chat_template": [{"name": [], "template": 3}, {"name": "default", "template": 3}]},
    ],
    ids=lambda settings: ascii(settings)[:50],
)
def test_settings_of_the_wrong_type(settings, tmp_path):
    said = refusal(load_tokenizer, orca(tmp_path, tokenizer_config=settings))
    assert str(tmp_path) in said and len(said) < 1000


@pytest.mark.parametrize("i", [-1, 10**30, 32002])
def test_special_ids_are_ids(i, tmp_path):
    assert "bos_token_id is" in refusal(
        load_tokenizer, byte_level(tmp_path, tokenizer_config={}, config={"bos_token_id": i})
    )


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_that_lengthen_text(name, tmp_path):
    """One line, in little memory, soon, from files of a few kilobytes."""
    TOKENIZERS[name](tmp_path)
    taken = measure(encode_rare, tmp_path)
    assert taken.said.startswith(f"{tmp_path}/tokenizer.") and "use the tokenizer that" in taken.said, taken
    assert taken.seconds < 10 and taken.bytes < 100 * 2**20, taken


@pytest.mark.parametrize("seed", range(2))
def test_no_text_becomes_longer_than_the_bound(seed):
    """Of steps drawn at random, of which some meet what others write."""
    draw = random.Random(seed)
    letters = "aAbß ▁é\u0301ﬁﷺ한"

    def text(most: int) -> str:
        return "".join(draw.choices(letters, k=draw.randint(0, most)))

    def step() -> dict:
        kind = draw.choice(
            ["String", "Regex", "Regex", *("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "ByteLevel", "Nmt")]
        )
        if kind == "String":
            return replace(text(2) or "a", text(4))
        if kind == "Regex":
            expressions = [
                "a+",
                "(?=a)",
                "[aA]",
                r"\s",
                "a|bb",
                "(?i)ss",
                ".",
                "ab?",
                r"\b",
                "[^a]",
                "^",
                "aa",
                "a{2}?",
                "b*",
            ]
            return replace(draw.choice(expressions), text(4), "Regex")
        return {"type": kind}

    for _ in range(30):
        part = chain("normalizer", [step() for _ in range(draw.randint(1, 5))])
        normalizer = tokenizers.Tokenizer.from_str(
            json.dumps(part | {"model": {"type": "WordLevel", "vocab": {}, "unk_token": ""}})
        ).normalizer
        largest = tokenizer_probe._before(normalizer, tokenizer_probe._Weights()).largest
        for given in (*letters, *(text(12) for _ in range(20))):
            try:
                normalized = normalizer.normalize_str(given)
            except BaseException as error:
                # The library's own, of some steps after each other.
                assert type(error).__name__ == "PanicException"
            else:
                # Empty matches: one more than characters, for each step.
                assert len(normalized) <= largest * (len(given) + 5), (part, given)


@pytest.mark.parametrize("kind", ["String", "Regex"])
def test_tokenizers_that_replace_much_are_read(kind, tmp_path):
    """Each character once, by one or by a few: however many rules there are, no text becomes much longer."""
    rules = dict(zip("‘’“”–—«»•·", '\'\'""--""**')) | {"ﬁ": "fi", "ﬄ": "ffl", "…": "...", "™": "(tm)"}
    rules |= {"½": "1/2", "€": "EUR", "ß": "ss", "\n": "<0x0A>", "\t": "<0x09>", "\r": "<0x0D>"}
    tokenizer_json(chain("normalizer", [replace(*rule, kind) for rule in rules.items()]))(tmp_path)
    tok = load_tokenizer(tmp_path)
    assert tok.encode("".join(rules)) == tok.encode("".join(rules.values()))


@pytest.mark.parametrize(
    "normalizers",
    [
        [
            replace("\\S+@\\S+", "<email>", "Regex"),
            replace("https?://\\S+", "<url>", "Regex"),
            replace("\\d{4,}", "<number>", "Regex"),
        ],
        [{"type": "NFKC"}, {"type": "ByteLevel"}],
        [{"type": "NFKD"}, {"type": "Lowercase"}, {"type": "StripAccents"}, {"type": "NFC"}],
        [
            {
                "type": "BertNormalizer",
                "clean_text": True,
                "handle_chinese_chars": True,
                "strip_accents": None,
                "lowercase": True,
            }
        ],
        [replace("(?=[A-Z])", " ", "Regex"), replace(" {2,}", " ", "Regex"), {"type": "Prepend", "prepend": "▁"}],
    ],
    ids=["names", "bytes", "letters", "bert", "spaces"],
)
def test_tokenizers_in_use_are_read(normalizers, tmp_path):
    tokenizer_json(chain("normalizer", normalizers))(tmp_path)
    assert load_tokenizer(tmp_path).encode("a@b.c https://d.e/f 12345 ﷺ")


def test_a_tokenizers_dropout_is_off(tmp_path, caplog):
    plain = load_tokenizer(byte_level(tmp_path / "plain"))
    (tmp_path / "random").mkdir()
    model = read(tmp_path / "plain" / "tokenizer.json")["model"]
    tokenizer_json({"model": model | {"dropout": 0.5}})(tmp_path / "random")
    tok = load_tokenizer(tmp_path / "random")
    text = "the quick brown fox jumps over the lazy dog"
    assert tok.encode(text) == plain.encode(text) and tok.encode_template(text) == plain.encode_template(text)
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "its dropout, which gives a text other ids each time, is switched off"
    ]


def test_a_tokenizer_that_panics(tmp_path):
    """An endless regular-expression search ends in a panic of Rust, which does not derive from Exception."""
    directory = byte_level(tmp_path)
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    write(directory / "tokenizer.json", read(directory / "tokenizer.json") | {"pre_tokenizer": split})
    assert f"{directory}/tokenizer.json: cannot encode 'aaaaa" in refusal(
        load_tokenizer(directory).encode, "a" * 50 + "b"
    )


# ---------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_unpack_to_much(name, tmp_path):
    """Refused, or read with a few pieces of them in memory."""
    path = ROWS[name](tmp_path)
    taken = measure(lambda directory: sum(1 for _ in open_file(path).records()), tmp_path)
    if name in ("a text for thousands of rows", "a dictionary of Arrow's", "views of Arrow's", "beginnings of a text"):
        assert taken.said == f"no error: {90 if name.startswith('beginnings') else 2000}", taken
    else:
        assert taken.said.startswith(f"{path}: ") and "unpacks to more than" in taken.said, taken
    assert taken.seconds < 10 and taken.bytes < 400 * 2**20, taken


@pytest.mark.parametrize(
    "says, of, complaint",
    [
        (200, lambda chunk: chunk.total_uncompressed_size - 23, "cannot be read as parquet"),
        (8000, lambda chunk: chunk.total_compressed_size - 23, "the pages of column question are broken"),
        (-1, lambda chunk: chunk.total_compressed_size - 23, "the pages of column question are broken"),
    ],
    ids=["unpacks to less", "is longer than the file", "is negative"],
)
def test_rows_that_lie_in_pages_that_lie(says, of, complaint, tmp_path):
    """A chunk is one page here, after its header of 23 bytes."""
    path = forged(LARGE_PAGE, says, of, page=True)(tmp_path)
    taken = measure(lambda directory: sum(1 for _ in open_file(path).records()), tmp_path)
    assert taken.said.startswith(f"{path}: ") and complaint in taken.said, taken
    assert taken.seconds < 10 and taken.bytes < 200 * 2**20, taken


def test_rows_that_lie_of_their_lengths(tmp_path):
    path = lengths_of_texts(tmp_path)
    taken = measure(lambda directory: sum(1 for _ in open_file(path).records()), tmp_path)
    assert taken.said == f"{path}: cannot be read as parquet (the pages of column question are broken)", taken
    assert taken.seconds < 10 and taken.bytes < 200 * 2**20, taken


ENCODINGS = ["PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_tables_are_read_in_any_encoding(encoding, version, compression, tmp_path):
    """Of flat and nested columns, with nulls, on many pages."""
    texts = [f"{'x' * (n % 50)}{n}" if n % 7 else None for n in range(5000)]
    columns = {"text": texts, "lists": [[text, "a"] if text else None for text in texts[:3000]] + [None] * 2000}
    columns["required"] = pyarrow.array(list(map(str, range(5000))))
    path = tmp_path / "rows.parquet"
    fields = [pyarrow.field("required", pyarrow.string(), nullable=False)]
    schema = pyarrow.schema([("text", pyarrow.string()), ("lists", pyarrow.list_(pyarrow.string())), *fields])
    encodings = dict.fromkeys(["text", "lists.list.element", "required"], encoding)
    options = {"data_page_size": 4000, "data_page_version": version, "compression": compression}
    write_table(
        pyarrow.table(columns, schema=schema),
        path,
        use_dictionary=False,
        column_encoding=encodings,
        write_page_checksum=True,
        write_batch_size=64,
        **options,
    )
    assert [record for _, record in open_file(path).records()] == read_table(path).to_pylist()


@pytest.mark.parametrize("stored", [True, False])
def test_tables_of_views_are_read(stored, tmp_path):
    columns = {
        "text": pyarrow.array(["a", None, "b" * 70] * 800, pyarrow.string_view()),
        "bytes": pyarrow.array([b"a", b"\xff" * 50, None] * 800, pyarrow.binary_view()),
        "lists": pyarrow.array([["a", None], [], ["b" * 70] * 2] * 800, pyarrow.list_view(pyarrow.string())),
        "views": pyarrow.array([["a", "b" * 70], None, []] * 800, pyarrow.list_(pyarrow.string_view())),
    }
    expected = pyarrow.table(columns).to_pylist()
    write_table(pyarrow.table(columns), tmp_path / "rows.parquet", store_schema=stored)
    for path in (tmp_path / "rows.parquet", table(lambda: columns, "arrow")(tmp_path)):
        assert [record for _, record in open_file(path).records()] == expected


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_tables_are_read_as_arrow_reads_them(suffix, tmp_path):
    """Whatever of their values is stored once, in whatever pieces they are read."""
    rows = {
        "text": ["a", None, "b" * 70, "a"] * 600,
        "bytes": [b"a", b"\xff"] * 1200,
        "turns": [[{"role": "user", "content": None, "n": 1}], [], None] * 800,
        "label": [True, None, False] * 800,
    }
    columns = {name: pyarrow.array(values) for name, values in rows.items()}
    columns["map"] = pyarrow.array([[("a", "b")], None, []] * 800, pyarrow.map_(pyarrow.string(), pyarrow.string()))
    columns["large"] = pyarrow.array(["a", "b"] * 1200, pyarrow.large_string())
    columns["kind"] = columns["text"].dictionary_encode()
    columns["price"] = pyarrow.array([Decimal("1.50"), None] * 1200, pyarrow.decimal128(20, 2))
    expected = pyarrow.table(columns)
    path = table(lambda: columns, suffix)(tmp_path)
    found = [record for _, record in open_file(path).records()]
    assert found == [
        {name: drop_null_fields(value) for name, value in record.items()} for record in expected.to_pylist()
    ]


def test_row_groups_of_nested_texts(tmp_path):
    turns = [[{"role": "user", "content": f"{n % 7}"}] for n in range(300)]
    pyarrow.parquet.write_table(pyarrow.table({"turns": turns}), tmp_path / "rows.parquet", row_group_size=100)
    found = [record for _, record in open_file(tmp_path / "rows.parquet").records()]
    assert found == [{"turns": one} for one in turns]


def test_broken_footers_end_in_an_error(tmp_path):
    """pyarrow ends the process where it is asked for what some of them say of a column."""
    path = tmp_path / "rows.parquet"
    turns = [[{"role": "user", "content": f"{n % 7}"}] for n in range(300)]
    pyarrow.parquet.write_table(pyarrow.table({"turns": turns, "n": range(300)}), path, row_group_size=100)
    content = path.read_bytes()
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    draw = random.Random(0)
    for _ in range(30):
        broken = bytearray(content)
        broken[draw.randrange(start, len(content))] = draw.randrange(256)
        path.write_bytes(broken)
        said = measure(lambda directory: sum(1 for _ in open_file(path).records()), tmp_path).said
        assert said.startswith((f"{path}: ", "no error: ")), said


# ----------------------------------------------------------------------------------------------------------- templates

ESCAPES = [
    "''.__class__.__mro__[1].__subclasses__()",
    "[].__class__.__base__.__subclasses__()",
    "cycler.__init__.__globals__.os.popen('touch canary')",
    "lipsum.__globals__['os'].system('touch canary')",
    "joiner.__init__.__globals__",
    "namespace.__init__.__globals__",
    "namespace().__class__",
    "raise_exception.__globals__",
    "strftime_now.__globals__",
    "self.__init__.__globals__",
    "self._TemplateReference__context.environment",
    "(''|attr('__class__')).__mro__",
    "''['__class__']",
    "'{0.__class__.__mro__}'.format('')",
    "'{x.__class__}'.format_map({'x': 1})",
    "('%s'|format(''.__class__))",
    "messages.append(1)",
    "messages[0].update(role='x')",
    "messages[0].__class__",
    "(messages|map(attribute='__class__')|list)[0].mro()",
    "range.__self__",
    "dict.fromkeys.__self__",
    "tojson",
    "loop.__init__",
    "().__doc__.__class__.__subclasses__()",
    "url_for.__globals__",
    "config",
]
ENDLESS = [
    "{{ 'a' * 10**10 }}",
    "{{ [0] * 10**10 }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ 'a'|center(10**10) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '{:10000000000}'.format(1) }}",
    "{{ [1]|batch(10**10, 0)|list }}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s|replace('a', ns.s) %}{% endfor %}",
    "{% set ns = namespace(s=['ab', 'c']) %}"
    "{% for i in range(60) %}{% set ns.s = [ns.s|join(ns.s|join), 'c'] %}{% endfor %}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{{" + "(" * 10**5,
    "{% if 1 %}" * 10**4,
    "{{ " + "-" * 10**5 + "1 }}",
    "{{ raise_exception('x' * 10**7) }}",
]
# Each takes as long as it is allowed to.
SLOW = [
    "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}",
    "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l|tojson }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "{{ 10 ** (10 ** 10) }}",
]


def rendered(source: str) -> str:
    return sandbox.render(source, {"messages": turns("Hello", "Hi")}, 10**6)


@pytest.mark.parametrize("expression", ESCAPES)
def test_templates_do_not_reach_the_interpreter(expression, tmp_path, monkeypatch):
    """An error or nothing: never a class, a module or a file."""
    monkeypatch.chdir(tmp_path)
    try:
        text = rendered("{{ " + expression + " }}")
    except sandbox.TemplateFailed:
        text = ""
    assert not any(word in text for word in ("class", "module", "object", "function", "subprocess")), text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("source", ENDLESS, ids=lambda source: source[:60])
def test_templates_end(source):
    began = time.monotonic()
    with pytest.raises(sandbox.TemplateFailed) as failed:
        rendered(source)
    assert time.monotonic() - began < 60 and len(str(failed.value)) <= 1000
    # The next one is not affected.
    assert rendered("{{ messages[0].content }}") == "Hello"


@pytest.mark.parametrize(
    "source",
    [SLOW[0], *(pytest.param(source, marks=pytest.mark.slow) for source in SLOW[1:])],
    ids=["loops", "doubled lists", "macros", "power"],
)
def test_templates_that_take_too_long(source, monkeypatch, tmp_path):
    """From any thread, they fail after the time limit; then at once, as every row would take as long."""
    tok = load_tokenizer(with_template(tmp_path, source))
    said = []

    def ask():
        said.append(refusal(render_chat, tok, turns("Hello"), template="jinja"))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    began = time.monotonic()
    ask()
    assert time.monotonic() - began < 0.5
    reason = "it took more than 5 seconds of processor time"
    expected = f"{tmp_path}: the chat template failed: {reason}; fix the messages, or choose another template"
    assert said == [expected, expected]
    assert rendered("{{ messages[0].content }}") == "Hello"


def test_templates_from_threads_and_forks():
    """Each gets its own text; a forked process uses a sandbox process of its own."""
    texts: dict[int, set[str]] = {}

    def ask(n: int):
        for _ in range(20):
            texts.setdefault(n, set()).add(sandbox.render("{{ n }}", {"n": n}, 100))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if (child := os.fork()) == 0:
        ask(5)
        os._exit(texts.get(5) != {"5"})
    ask(6)
    assert os.waitpid(child, 0)[1] == 0 and texts == {n: {str(n)} for n in (0, 1, 2, 3, 6)}


def sandbox_process() -> subprocess.Popen:
    assert sandbox._worker.process is not None
    return sandbox._worker.process


def test_a_templates_process_that_is_gone_is_replaced():
    """Killed from outside, between two renderings or within one."""
    assert rendered("a") == "a"
    process = sandbox_process()
    process.kill()
    process.wait()
    assert rendered("{#" + "x" * 10**5 + "#}b") == "b"
    for source, signum in (("{#" + "y" * 10**6 + "#}c", signal.SIGKILL), ("d", signal.SIGTERM)):
        process = sandbox_process()
        process.send_signal(signal.SIGSTOP)

        def end(process=process, signum=signum):
            process.send_signal(signum)
            process.send_signal(signal.SIGCONT)

        threading.Timer(0.2, end).start()
        assert rendered(source) == source[-1]


@pytest.mark.parametrize(
    "end, said", [("kill", "killed twice"), ("terminate", "killed twice"), (None, "no process could be started")]
)
def test_a_template_is_not_blamed_for_accidents(end, said, monkeypatch):
    """When memory runs out, say: the rendering fails, and the template is tried again the next time."""

    def start(command, **options):
        if end is None:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        process = Popen([sys.executable, "-c", "import time; time.sleep(60)"], **options)
        getattr(process, end)()
        return process

    Popen = subprocess.Popen
    worker = sandbox._Worker()
    monkeypatch.setattr(sandbox, "_worker", worker)
    with monkeypatch.context() as context:
        context.setattr(subprocess, "Popen", start)
        with pytest.raises(sandbox.TemplateFailed, match=said):
            rendered("{{ messages[0].content }}")
    assert rendered("{{ messages[0].content }}") == "Hello"
    worker.stop()


def test_a_conversation_that_exhausts_a_template_is_not_all_of_them(monkeypatch):
    """Those at least half as long are rejected at once; shorter ones are rendered."""

    def ask(content: str) -> str:
        return sandbox.render(source, {"content": content}, 100)

    endless = "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}"
    source = "{% if content|length > 5000 %}" + endless + "{% endif %}ok"
    assert ask("x" * 4000) == "ok"
    began = 0.0
    for length in (10**4, 10**4, 5001):
        began = time.monotonic()
        with pytest.raises(sandbox.TemplateFailed, match="processor time"):
            ask("x" * length)
    assert time.monotonic() - began < 0.5 and ask("x" * 4000) == "ok"


@pytest.mark.parametrize("secret", ["MINORCA_API_KEY", "OPENAI_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"])
def test_the_process_of_a_template_has_no_secrets(secret, monkeypatch):
    monkeypatch.setenv(secret, "sesame")
    worker = sandbox._Worker()
    monkeypatch.setattr(sandbox, "_worker", worker)
    try:
        assert rendered("a") == "a"
        assert b"sesame" not in Path(f"/proc/{sandbox_process().pid}/environ").read_bytes()
    finally:
        worker.stop()


def test_the_process_of_a_template_can_open_nothing():
    """If a template escaped from Jinja's sandbox: no file, no process, no bytes on a disk."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import sandbox, os, signal, socket\n"
        "sandbox.sys.stdin = open('/dev/null'); sandbox._serve()\n"
    )
    for act in (
        "open('/etc/hostname')",
        "socket.socket()",
        "os.system('true') and 1/0",
        "os.open('x', os.O_CREAT)",
        "__import__('ctypes')",
    ):
        result = subprocess.run(
            [
                sys.executable,
                "-c",
                f"{code}try: {act}\nexcept (OSError, ZeroDivisionError, ImportError): sys.exit(7)",
                ROOT / "minorca" / "data",
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
        assert result.returncode == 7, (act, result.stderr[-500:])


# ---------------------------------------------------------------------------------------------------------------- fuzz


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fuzz") / "originals"
    fuzzing.make(directory)
    return directory


@pytest.mark.parametrize(
    "first, count", [(0, 150), *(pytest.param(1000 * n, 1000, marks=pytest.mark.slow) for n in range(1, 7))]
)
def test_broken_files_are_read_or_refused(first, count, originals):
    """See fuzzing.py. A failure prints its seed: `python tests/fuzzing.py /tmp/new SEED 1` repeats it."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "RUST_BACKTRACE": "0"}
    command = [sys.executable, fuzzing.__file__, originals, str(first), str(count)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, cwd=originals)
    lines = result.stdout.splitlines()
    failed = [line for line in lines if line.startswith("FAILED")]
    assert result.returncode == 0, "\n".join(
        [*failed, f"exit status {result.returncode} after {lines[-1:]}", result.stderr[-3000:]]
    )
    assert not list(originals.parent.rglob("canary"))
