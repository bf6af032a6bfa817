"""Files as people bring them, from their bytes to ids and loss masks, compared with what others make of them."""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from minorca import UserError, load_tokenizer
from minorca.config import DataConfig
from minorca.data.chat_template import resolve_template
from minorca.data.prepare import prepare_store
from minorca.data.store import TokenStore
from minorca.data.tokenizer import Tokenizer
from tests.corpus import reference
from tests.corpus.case import Case
from tests.corpus.cases import CASES
from tests.data.test_chat_template import INSTRUCT_V3, with_template
from tests.data.test_tokenizer import NAMES, V1, V3, orca, sentencepiece_directory

# ChatML with tools, whose answers are marked as transformers wants it.
TEMPLATE = (Path(__file__).parent / "chatml.jinja").read_text()
# How transformers reads a tokenizer.model of Mistral's.
LLAMA = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True}
SETTINGS = TypeAdapter(DataConfig)
TOTALS = ("read", "kept", "tokens", "trained tokens")


@dataclass
class Model:
    """A model that reads rows, the template by which, and the reference that says what they are."""

    tok: Tokenizer
    template: str
    reference: Callable


def sentencepiece_model(directory: Path, source: Path, **config) -> Path:
    files = {"tokenizer_config": NAMES | LLAMA | config, "config": {"model_type": "mistral"}}
    return sentencepiece_directory(directory, source, **files)


MODELS: dict[str, Callable[[Path], tuple[Path, str, Callable]]] = {
    "jinja": lambda path: (with_template(path, TEMPLATE), "jinja", reference.Transformers(path)),
    "openorca": lambda path: (orca(path), "auto", reference.OpenOrca(V1)),
    "mistral-v1": lambda path: (sentencepiece_model(path, V1), "mistral-v1", reference.MistralCommon(V1)),
    "mistral-v3": lambda path: (sentencepiece_model(path, V3), "mistral-v3", reference.MistralCommon(V3)),
    # Its own template is Mistral-7B-Instruct-v0.3's, which takes no system prompt.
    "instruct": lambda path: (
        sentencepiece_model(path, V3, chat_template=INSTRUCT_V3),
        "auto",
        reference.MistralCommon(V3),
    ),
    "v1": lambda path: (sentencepiece_model(path, V1), "none", reference.Transformers(path)),
    "v3": lambda path: (sentencepiece_model(path, V3), "none", reference.Transformers(path)),
    "chatml": lambda path: (
        orca(path, tokenizer_config=LLAMA, config={"model_type": "mistral"}),
        "none",
        reference.Transformers(path),
    ),
    "plain": lambda path: (sentencepiece_model(path, V3), "none", reference.SentencePiece(V3)),
}


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Callable[[str], Model]:
    @cache
    def make(name: str) -> Model:
        directory, template, expected = MODELS[name](tmp_path_factory.mktemp(name))
        tok = load_tokenizer(directory)
        return Model(tok, resolve_template(tok, template), expected)

    return make


def settings(case: Case, directory: Path) -> DataConfig:
    """The settings of a case whose files are in a directory."""

    def located(source: str | dict) -> str | dict:
        if isinstance(source, str):
            return str(directory / source)
        return source | {"path": str(directory / source["path"])}

    train = case.data.get("train", next(iter(case.files)))
    paths = [located(source) for source in train] if isinstance(train, list) else located(train)
    return SETTINGS.validate_json(json.dumps(case.data | {"train": paths, "store": str(directory / "store")}))


def rendered(case: Case, model: Model, directory: Path) -> TokenStore:
    data = settings(case, directory)
    return prepare_store(data.sources(data.train), model.tok, model.template, data)


@pytest.mark.parametrize("case", [case for case in CASES if not case.refusal], ids=lambda case: case.name)
def test_rows_are_those_of_the_reference(case, models, tmp_path):
    """Every row has the reference's ids and loss mask, is where the case says, and nothing else happens unsaid."""
    case.write(tmp_path)
    model = models(case.model)
    store = rendered(case, model, tmp_path)
    assert [store.locate(i).removeprefix(f"{tmp_path}/") for i in range(len(store))] == [at for at, _ in case.rows]
    for i, (_, row) in enumerate(case.rows):
        ids, mask = model.reference(row)
        if case.data.get("train_on") == "all":
            mask = [False] + [True] * (len(ids) - 1)
        assert (store.row(i)[0].tolist(), store.row(i)[1].tolist()) == (ids, mask)
    counts = sum((Counter(source.counts) for source in store.sources), Counter())
    assert {what: count for what, count in counts.items() if what not in TOTALS} == case.counts
    notes = {what: note for source in store.sources for what, note in source.notes.items()}
    assert {what: notes.get(what) for what in case.notes} == {
        what: note.format(dir=tmp_path) for what, note in case.notes.items()
    }


@pytest.mark.parametrize("case", [case for case in CASES if case.refusal], ids=lambda case: case.name)
def test_refusals_have_these_words(case, models, tmp_path):
    """The whole line of each problem; and no store is left half-written."""
    case.write(tmp_path)
    with pytest.raises(UserError) as caught:
        rendered(case, models(case.model), tmp_path)
    lines = [str(problem).replace(str(tmp_path), "{dir}") for problem in caught.value.problems]
    if "(...)" in case.refusal[0]:
        # A library's words, which are another's in each of its versions.
        lines = [re.sub(r"\(.+\)", "(...)", line) for line in lines]
    assert lines == list(case.refusal)
    assert not list(tmp_path.glob("store/*/"))


def test_the_corpus_is_large_enough():
    """Names are unique, and both outcomes occur."""
    assert len({case.name for case in CASES}) == len(CASES) >= 80
    assert min(sum(bool(case.refusal) == refused for case in CASES) for refused in (True, False)) >= 20
