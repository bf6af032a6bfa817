"""Settings, added tokens and chat templates beside a vocabulary, compared with transformers on the same directory."""

import json

import pytest
from transformers import AutoTokenizer

from minorca import UserError, load_tokenizer
from minorca.data.tokenizer import check_vocabulary
from tests.data.test_tokenizer import NAMES, byte_level, orca, write

# the tokens of `byte_level`'s tokenizer.json have ids up to 294
NEXT = 295
TOOL = {"content": "<tool>", "special": True, "normalized": False}
WORD = {"content": "<tool>", "special": False}
CHATML = "<|im_start|>user\nSee [INST] fox<|im_end|>\n<|im_start|>assistant\nthe end"


@pytest.mark.parametrize(
    "settings, files",
    [
        ({}, {"added_tokens": {"<tool>": NEXT}}),
        ({}, {"added_tokens": {"[PAD]": NEXT + 1, "<tool>": NEXT}}),
        ({"additional_special_tokens": ["<tool>"]}, {"added_tokens": {"<tool>": NEXT}}),
        ({"added_tokens_decoder": {str(NEXT): TOOL}}, {}),
        ({"added_tokens_decoder": {str(NEXT): WORD}}, {"added_tokens": {"[PAD]": NEXT}}),
        ({"added_tokens_decoder": {str(NEXT + 1): TOOL, str(NEXT): TOOL | {"content": "[PAD]", "lstrip": True}}}, {}),
        ({"added_tokens_decoder": {"294": {"content": "⟨word⟩", "special": True}}}, {}),
        ({"pad_token": "[PAD]"}, {}),
        (
            {
                "pad_token": TOOL | {"content": "[PAD]", "__type": "AddedToken"},
                "unk_token": "[UNK]",
                "extra_special_tokens": ["<tool>"],
            },
            {},
        ),
        ({"pad_token": "[PAD]"}, {"added_tokens": {"<tool>": NEXT}}),
        ({"pad_token": "⟨word⟩"}, {}),
        ({}, {"added_tokens": {"<unk>": 0, "⟨word⟩": 294}}),
        ({}, {"special_tokens_map": {"pad_token": "[PAD]"}}),
        ({"pad_token": "<unk>"}, {"added_tokens": {"<s>": 1, "<unk>": 0}}),
    ],
    ids=str,
)
def test_tokens_that_tokenizer_json_lacks(settings, files, tmp_path):
    """Their ids, and those of texts with them, are transformers'; as text, special ones are ordinary characters."""
    directory = byte_level(tmp_path, **({"tokenizer_config": NAMES | settings} | files))
    tok, theirs = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    assert tok.vocab_size == len(theirs)
    for text in ("a <tool> b", "the [PAD]fox [UNK]<|im_end|>", "⟨word⟩ <|im_start|>", "x[PAD] <tool>"):
        assert tok.encode_template(text) == theirs(text, add_special_tokens=False)["input_ids"], text
        assert not set(tok.encode(text)) & set(tok.control_ids.values())
    special = {token.content: i for i, token in theirs.added_tokens_decoder.items() if token.special}
    # a template's tokens are special here in any case
    assert tok.control_ids == special | {"<|im_start|>": 293}


@pytest.mark.parametrize(
    "files", [{"added_tokens": {"<tool>": 300}}, {"tokenizer_config": {"added_tokens_decoder": {"10": TOOL}}}], ids=str
)
def test_an_id_that_tokenizer_json_cannot_give(files, tmp_path):
    """transformers would take the next free one, of which the model knows nothing."""
    with pytest.raises(UserError, match="'<tool>' has id .*, but the next free id of tokenizer.json is 295"):
        load_tokenizer(byte_level(tmp_path, **files))


@pytest.mark.parametrize("settings", [{"legacy": True}, {"legacy": False}, {"add_prefix_space": False}], ids=str)
def test_the_space_before_text(settings, tmp_path):
    """transformers puts one before every piece of text, before the first alone, or before none."""
    names = {"tokenizer_class": "LlamaTokenizer"} | settings
    directory = orca(tmp_path, tokenizer_config=names)
    tok, theirs = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    for text in (CHATML, "Be brief.<|im_end|>\nYes", "<|im_start|>Ünï 日本<s>a</s>\n\nb", "", "a"):
        assert tok.encode_template(text) == theirs(text, add_special_tokens=False)["input_ids"], text
    assert tok.encode("Hello") == theirs("Hello", add_special_tokens=False)["input_ids"]


def test_a_padding_token_of_sentencepiece(tmp_path):
    """Named in the settings alone, it has the next free id, as in transformers."""
    settings = {"tokenizer_class": "LlamaTokenizer", "pad_token": "[PAD]"}
    directory = orca(tmp_path, tokenizer_config=settings, special_tokens_map={})
    tok, theirs = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    assert tok.control_ids["[PAD]"] == theirs.convert_tokens_to_ids("[PAD]") == 32002


@pytest.mark.parametrize("make", [orca, byte_level])
def test_a_padding_token_without_a_row(make, tmp_path):
    """One that nothing produces loads; where a template writes it, it is refused, and so is any other id."""
    directory = make(tmp_path, tokenizer_config=NAMES | {"pad_token": "[PAD]"}, special_tokens_map={})
    tok = load_tokenizer(directory)
    rows = tok.control_ids["[PAD]"]
    check_vocabulary(tok, rows, directory)
    assert tok.decode(tok.encode("a [PAD]")) == "a [PAD]"
    with pytest.raises(UserError, match=rf"text has the token \[PAD\], id {rows}, which is beyond"):
        tok.encode_template("a [PAD]")
    with pytest.raises(UserError, match=f"ids up to {rows}, but vocab_size is {rows - 1}"):
        check_vocabulary(tok, rows - 1, directory)
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}[PAD]")
    with pytest.raises(UserError, match=f"ids up to {rows}, but vocab_size is {rows}"):
        check_vocabulary(load_tokenizer(directory), rows, directory)


def test_the_configuration_beside_it_says_how_many_rows_there_are(tmp_path):
    tok = load_tokenizer(byte_level(tmp_path, tokenizer_config={"pad_token": "[PAD]"}, config={"vocab_size": NEXT}))
    with pytest.raises(UserError, match="beyond the model's vocab_size"):
        tok.encode_template("[PAD]")


TWO = {"default": "D", "tool_use": "T"}


@pytest.mark.parametrize(
    "config, files",
    [
        (TWO, {}),
        ([{"name": name, "template": text} for name, text in TWO.items()], {}),
        ("C", {"chat_template.jinja": "J"}),
        (TWO, {"chat_template.jinja": "J"}),
        ("C", {"chat_template.jinja": "J", "additional_chat_templates/rag.jinja": "R"}),
        (None, {"chat_template.jinja": "J", "additional_chat_templates/tool_use.jinja": "T"}),
        ("C", {"chat_template.json": '{"chat_template": "P"}'}),
    ],
    ids=str,
)
def test_templates_are_those_of_transformers(config, files, tmp_path):
    directory = byte_level(tmp_path, tokenizer_config={"chat_template": config})
    for name, text in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    tok, theirs = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    expected = theirs.chat_template if isinstance(theirs.chat_template, dict) else {"default": theirs.chat_template}
    assert tok.chat_templates == expected
    assert tok.chat_template == theirs.get_chat_template()


def test_the_template_of_a_processor(tmp_path):
    """chat_template.json is what transformers' processors read, where nothing else is."""
    directory = orca(tmp_path, chat_template={"chat_template": "P"})
    assert load_tokenizer(directory).chat_templates == {"default": "P"}


def test_templates_of_their_own_beside_a_default_in_the_settings(tmp_path):
    """transformers finds no default here, which would leave the model without its template."""
    directory = orca(tmp_path, tokenizer_config={"chat_template": "C"})
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    assert load_tokenizer(directory).chat_templates == {"default": "C", "tool_use": "T"}


def test_templates_in_a_hub_cache(tmp_path):
    """Links from the snapshot's inner directory to the blobs are followed, others are not."""
    model = tmp_path / "models--a--b"
    directory = orca(model, added_tokens={}) / "snapshots" / "0123"
    folder = directory / "additional_chat_templates"
    folder.mkdir(parents=True)
    (model / "blobs").mkdir()
    (model / "blobs" / "1").write_text("T")
    (folder / "tool_use.jinja").symlink_to("../../../blobs/1")
    orca(directory)
    assert load_tokenizer(directory).chat_templates == {"tool_use": "T"}
    (folder / "more.jinja").symlink_to("../../../tokenizer.model")
    with pytest.raises(UserError, match="more.jinja: is a symbolic link to .*, outside"):
        load_tokenizer(directory)


@pytest.mark.parametrize(
    "template",
    [3, {"default": 3}, [{"name": "default"}], ["D"], {"default": "x" * (10**6 + 1)}],
    ids=lambda t: str(t)[:30],
)
def test_a_template_that_is_not_text(template, tmp_path):
    for name, settings in (("tokenizer_config", {"chat_template": None}), ("chat_template", {})):
        directory = orca(tmp_path / name)
        write(directory, **{name: settings | {"chat_template": template}})
        with pytest.raises(UserError, match=f"{name}.json: chat_template (is|has)") as error:
            load_tokenizer(directory)
        assert len(str(error.value)) < 1000 and json.dumps("x" * 50) not in str(error.value)
