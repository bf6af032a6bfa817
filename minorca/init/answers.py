"""The four answers, checked: a model, data, a card and a goal."""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from minorca.config import Config, Source
from minorca.data.conversation import Preference
from minorca.data.formats import FORMATS
from minorca.data.new_tokens import training_tokenizer
from minorca.data.rendering import decide
from minorca.data.row_files import RowError
from minorca.data.sources import Row, SourceReader, open_source, read_rows
from minorca.data.tokenizer import check_vocabulary, load_tokenizer
from minorca.errors import UserError, nearest
from minorca.files.safe_io import quote
from minorca.files.weights import not_quantizable, open_model
from minorca.model.architecture import Architecture
from minorca.plan.devices import Machine, here, machine
from minorca.progress import progress

GOALS = {
    "adapters": "instruction tuning with adapters (LoRA)",
    "qlora": "the same on a small card, with the model in 4 bits (QLoRA)",
    "dpo": "preference tuning (DPO; of single labelled answers KTO)",
    "full": "instruction tuning of all weights",
}
THIS_MACHINE = "this machine"
# rows that are rendered to know how long rows are
SAMPLE = 1000


@dataclass(frozen=True)
class Model:
    """A model's directory.

    Attributes:
        in_4_bits: its files are quantized.
    """

    path: str
    arch: Architecture
    in_4_bits: bool


@dataclass(frozen=True)
class Data:
    """A source of rows.

    Attributes:
        formats: those that the first row fits.
        is_labelled: of format preference, it has one answer with a label.
        count: how many rows there are; None for a hub data set, which is not downloaded to count them.
    """

    path: str
    formats: list[str]
    is_labelled: bool
    count: int | None


def check_model(text: str) -> Model:
    """Raises UserError: there is no model of this network, or its weights or tokenizer are not there or damaged."""
    files = open_model(text)
    check_vocabulary(load_tokenizer(files.directory), files.arch.vocab_size, files.directory)
    return Model(text, files.arch, files.quantization is not None)


def check_data(text: str) -> Data:
    """Opens a source, tries the formats on its first row, and counts its rows.

    Raises:
        UserError: it cannot be read, is empty, or fits no format.
    """
    reader = _open(text)
    found = {name: row for name in FORMATS if isinstance(row := _first_row(reader, name), Row)}
    if not found:
        raise _of_no_format(reader)
    labelled = found.get("preference")
    content = labelled.content if labelled else None
    is_labelled = isinstance(content, Preference) and len(content.answers) == 1
    local = all(Path(file.path).exists() for file in reader.files)
    count = sum(1 for _ in progress(_records(reader), "counting rows", unit="rows")) if local else None
    return Data(text, list(found), is_labelled, count)


def _open(text: str) -> SourceReader:
    try:
        return open_source(Source(text, format="messages"), 1)
    except UserError:
        # what is plain text is read as such alone
        try:
            return open_source(Source(text, format="text"), 1)
        except UserError:
            pass
        raise


def _records(reader: SourceReader):
    return (record for file in reader.files for record in file.records())


def _first_row(reader: SourceReader, name: str) -> Row | RowError | None:
    """The first row read by a format; None where the source is empty or lacks a column."""
    source = dataclasses.replace(reader.source, format=name)
    try:
        return next(read_rows(dataclasses.replace(reader, source=source), 1, Counter()), None)
    except UserError as error:
        return RowError(error.message, path=error.path)


def _of_no_format(reader: SourceReader) -> UserError:
    first = next(islice(_records(reader), 1), None)
    if first is None:
        return UserError("has no rows", path=reader.path)
    _, record = first
    if isinstance(record, RowError):
        return record
    # a row that has a format's columns is wrong by their values
    for name, row_format in FORMATS.items():
        error = _first_row(reader, name) if set(row_format.needed) <= set(record) else None
        if isinstance(error, RowError):
            return error
    listed = "; ".join(f"{name}: {', '.join(row_format.needed)}" for name, row_format in FORMATS.items())
    message = f"its first row has the columns {quote(list(record))}, and no format fits ({listed})"
    remedy = "rename columns, or write the configuration by hand, with data.columns"
    return UserError(f"{message}; {remedy}", path=reader.path)


def check_card(text: str, ranks: int) -> Machine:
    """Raises UserError: the card is not known, or too old."""
    if text.lower() in (THIS_MACHINE, "here"):
        return here(ranks)
    try:
        return machine(text, ranks)
    except UserError as error:
        error.advice = f'or "{THIS_MACHINE}"'
        raise


def check_goal(text: str, model: Model, data: Data) -> str:
    """Raises UserError: it is not known, or the model or data are not for it."""
    if text not in GOALS:
        message = f"is {text}; expected one of {', '.join(GOALS)}{nearest(text, GOALS)}"
        raise UserError(message, field="--goal")
    others = [name for name in data.formats if name != "preference"]
    if text == "dpo" and "preference" not in data.formats:
        message = f"is dpo, which compares answers (prompt, chosen, rejected), and {data.path} has format {others[0]}"
        raise UserError(message, field="--goal")
    if text != "dpo" and not others:
        raise UserError(f"is {text}, and {data.path} has answers to compare; choose dpo", field="--goal")
    if text == "qlora" and not_quantizable(model.arch):
        message = "is qlora, and this model's rows are no multiple of 64 values long; choose adapters"
        raise UserError(message, field="--goal")
    if text == "full" and model.in_4_bits:
        raise UserError("is full, and the model's files are in 4 bits; choose adapters or qlora", field="--goal")
    return text


def default_goal(data: Data) -> str:
    return "dpo" if data.formats == ["preference"] else "adapters"


def sample_lengths(config: Config) -> list[int]:
    """Tokens of the first rows, rendered as for training, of those too that are too long for it.

    Raises:
        UserError: the first of them that is invalid; or none is left.
    """
    tok, template = training_tokenizer(config)
    (source,) = config.data.sources(config.data.train)
    rows = read_rows(open_source(source, SAMPLE), SAMPLE, Counter())
    lengths = []
    for row in progress(rows, "rendering a sample", unit="rows"):
        outcome = decide(row, tok, config.data, template)
        if outcome.error and not outcome.dropped:
            raise outcome.error
        if outcome.trained.any() and outcome.dropped in (None, "too long"):
            lengths.append(len(outcome.ids))
    if not lengths:
        raise UserError("none of its first rows has an answer to train", path=source.path)
    return lengths
