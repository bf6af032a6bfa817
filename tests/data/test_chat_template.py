"""Conversations to ids and loss masks, compared with mistral-common, transformers and sentencepiece."""

import json
from functools import lru_cache

import pytest
import sentencepiece
import tokenizers
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from transformers import AutoTokenizer

from minorca import UserError, load_tokenizer, render_chat
from minorca.data import sandbox, spans
from minorca.data.chat_template import TEMPLATES, render, resolve_template
from tests.data.test_tokenizer import FORGERIES, NAMES, V1, V2, V3, byte_level, orca, sentencepiece_directory

# OpenHermes-2.5-Mistral-7B's, which has Mistral-7B-OpenOrca's format
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
    " + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Mistral-7B-Instruct-v0.2's, and v0.3's without its tools
INSTRUCT = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + '%s[/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ '%s' + message['content'] + eos_token}}{% endif %}{% endfor %}"
)
INSTRUCT_V1 = INSTRUCT.replace("%s", " ", 1).replace("%s", "")
INSTRUCT_V3 = INSTRUCT.replace("%s", "", 1).replace("%s", " ")
# A reasoning model's: answers lose their thoughts once another turn follows
FORGETFUL = CHATML.replace(
    "message['content']", "(message['content'] if loop.last else message['content'].split('</think>')[-1])"
)
UNICODE = "Ünïcode 日本語 🦜\n\n\ttabs and  runs of spaces"


def turns(*contents: str, system: str | None = None) -> list[dict]:
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


CONVERSATIONS = [
    turns("Hello"),
    turns("Hello", system="Be brief."),
    turns("Hello", "Hi there!"),
    turns(UNICODE, UNICODE, UNICODE, system=UNICODE),
    turns("One", "1", "Two", "2", system="Count.\n"),
    turns(*(f"turn {i}: the quick brown fox" for i in range(24)), system="Long."),
]
PADDED = [
    turns("  leading and trailing  ", "  the same in an answer   ", " and\n ", "\n\n answer \n", system="  system "),
    turns(" ", " x ", "", "\n"),
]


@pytest.fixture(scope="session")
def shipped(smollm2, tmp_path_factory):
    """Models that ship a template, read by us and by transformers: a byte-level one with ChatML, and SmolLM2.

    SmolLM2's is a real tokenizer.json with a template that has a system prompt of its own, and no bos.
    """
    directories = smollm2, with_template(tmp_path_factory.mktemp("chatml"), CHATML)
    return [(load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)) for directory in directories]


@pytest.fixture(scope="session")
def mistral_common():
    """mistral-common's tokenizer for a file; `agnostic` is the mode that takes conversations ending in either role."""
    return lru_cache(lambda source: MistralTokenizer.from_file(str(source), mode=ValidationMode.agnostic))


def mistral(directory, source=V1, **files):
    return load_tokenizer(sentencepiece_directory(directory, source, "tokenizer.model" + source.suffix, **files))


def with_template(directory, template: str, **config):
    return byte_level(directory, tokenizer_config=NAMES | {"chat_template": template} | config)


def trained_text(tok, rendered) -> list[str]:
    """The runs of trained tokens, decoded, a control token shown as its string."""
    names = {i: name for name, i in tok.control_ids.items()}
    runs: list[list[int]] = []
    previous = False
    for i, trained in zip(rendered.ids, rendered.trained, strict=True):
        if trained and not previous:
            runs.append([])
        if trained:
            runs[-1].append(i)
        previous = trained
    return ["".join([tok.decode(run), *(names[i] for i in run if i in names)]) for run in runs]


@pytest.mark.parametrize("messages", CONVERSATIONS + PADDED)
@pytest.mark.parametrize("version, source", [("v1", V1), ("v2", V2), ("v3", V3)])
def test_mistral_templates_equal_mistral_common(version, source, messages, tmp_path, mistral_common):
    """Ids of InstructTokenizerV1, V2 and V3, and every answer trained with its end."""
    expected = mistral_common(source).encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
    tok = mistral(tmp_path, source)
    assert render_chat(tok, messages, messages[-1]["role"] == "user", f"mistral-{version}") == expected
    rendered = render(tok, messages, f"mistral-{version}")
    assert rendered.ids == expected
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    kept = answers if version == "v1" else [answer.rstrip(" ") for answer in answers]
    assert trained_text(tok, rendered) == [f"{answer}</s>" for answer in kept]


def test_chatml_is_what_openorca_was_trained_on(tmp_path):
    """axolotl's alpaca_w_system: <s> and the prompt, then the answer encoded alone and <|im_end|>, both trained."""
    tok, model = load_tokenizer(orca(tmp_path)), sentencepiece.SentencePieceProcessor(model_file=str(V1))
    start, end = [32001], [32000]
    prompt = [1, *start, *model.encode("system\nBe brief."), *end, *model.encode("\n")]
    prompt += [*start, *model.encode("user\nWho?"), *end, *model.encode("\n"), *start, *model.encode("assistant\n")]
    answer = [*model.encode("Me."), *end]
    messages = turns("Who?", "Me.", system="Be brief.")
    assert render_chat(tok, messages[:2]) == prompt
    rendered = render(tok, messages)
    assert rendered.ids == prompt + answer + model.encode("\n")
    assert rendered.trained == [False] * len(prompt) + [True] * len(answer) + [False] * 2
    assert render(tok, turns("Who?", system="")).ids == render(tok, turns("Who?")).ids


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_jinja_equals_transformers(messages, shipped):
    """`apply_chat_template` of the same files; the answers and their ends are trained."""
    for tok, reference in shipped:
        if messages[-1]["role"] == "user":
            prompt = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert render_chat(tok, messages, template="jinja") == prompt
        expected = reference.apply_chat_template(messages, return_dict=False)
        assert render_chat(tok, messages, False, "jinja") == expected
        rendered = render(tok, messages, "jinja")
        assert rendered.ids == expected and not rendered.notes
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        assert trained_text(tok, rendered) == [f"{answer}<|im_end|>" for answer in answers]


@pytest.mark.parametrize(
    "kind", ["byte-level", "sentencepiece", "smollm2", "normalized", "metaspace", "strip", "single", "longer"]
)
def test_what_is_encoded_once_has_the_ids_of_the_whole(kind, tmp_path, smollm2, monkeypatch):
    """As if all text before each border were encoded again, also where control strings do not just split."""
    added = {
        "normalized": {"normalized": True},
        "strip": {"lstrip": True, "rstrip": True},
        "single": {"single_word": True},
        "longer": {},
    }
    if kind == "sentencepiece":
        directory = orca(tmp_path, tokenizer_config={"chat_template": CHATML})
    elif kind == "smollm2":
        directory = smollm2
    else:
        directory = with_template(tmp_path, CHATML)
        model = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        if kind in ("normalized", "metaspace"):
            model.normalizer = tokenizers.normalizers.Prepend("x")
        if kind == "metaspace":
            # Puts a mark where a text starts, and nowhere else.
            model.normalizer = None
            model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace("x", prepend_scheme="first")
        for name in ["<|im_start|>", "<|im_end|>", "<|im_end|>\nx"] if kind in added else []:
            model.add_special_tokens([tokenizers.AddedToken(name, **{"normalized": False} | added[kind])])
        model.save(str(directory / "tokenizer.json"))
    tok = load_tokenizer(directory)
    forged = turns(*(f" {text}\n" for text in FORGERIES), "the end", system=FORGERIES[0])
    messages = [*CONVERSATIONS, *PADDED, turns("x", "y", "x\n", "x", " x ", "x\ny")]
    # Typed control strings make text be encoded in pieces, which for these tokenizers are not the pieces of the whole.
    if kind not in ("normalized", "metaspace", "strip"):
        messages.append(forged)
    messages.append(turns("x" * 30, " a ", "x" * 30, "\n\nb", "c", "d"))
    once = [render(tok, m, "jinja") for m in messages]
    monkeypatch.setattr(spans._IncrementalEncoder, "__call__", lambda self, text: self.encode(text))
    assert once == [render(tok, m, "jinja") for m in messages]


@pytest.mark.parametrize(
    "make", [with_template, lambda directory, template: orca(directory, tokenizer_config={"chat_template": template})]
)
def test_long_conversations_are_encoded_once(make, tmp_path, monkeypatch):
    """The mask costs a few times the text, however many answers; a conversation that is too long is rendered once."""
    tok = load_tokenizer(make(tmp_path, CHATML))
    encoded: list[int] = []
    texts: list[str] = []
    encode = tok.encode_template
    write = sandbox.render

    def counted_encode(text: str) -> list[int]:
        encoded.append(len(text))
        return encode(text)

    def counted_write(*given) -> str:
        texts.append(write(*given))
        return texts[-1]

    monkeypatch.setattr(tok, "encode_template", counted_encode)
    monkeypatch.setattr(sandbox, "render", counted_write)
    messages = turns(*(f"turn {i}: the quick brown fox {UNICODE}" for i in range(100)))
    rendered = render(tok, messages, "jinja")
    assert rendered.ids == encode(texts[0]) and sum(encoded) < 6 * len(texts[0])
    # The text, the text with marks, and three short ones that find the generation prompt.
    assert len(texts) <= 5
    texts.clear()
    ids = render_chat(tok, [*messages, *turns("more")], template="jinja", max_ids=len(rendered.ids))
    assert len(ids) > len(rendered.ids) and len(texts) == 1


def test_jinja_speaks_the_dialect_of_chat_templates(tmp_path):
    """What transformers adds to Jinja: loop controls, generation blocks, tojson, namespace, trimmed blocks."""
    template = """{%- set ns = namespace(n=0) %}
    {% for message in messages %}
        {% if message.role == 'system' %}
            {% continue %}
        {% endif %}
        {% set ns.n = ns.n + 1 %}
{{ bos_token if loop.first }}{{ ns.n }}{{ {'é<': message.content} | tojson }}
        {% if message.role == 'assistant' %}{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
        {% endif %}
    {% endfor %}{{ unknown }}{{ strftime_now('%Y') }}"""
    directory = with_template(tmp_path, template)
    tok, reference = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    for messages in CONVERSATIONS + PADDED:
        expected = reference.apply_chat_template(messages, return_dict=False)
        assert render_chat(tok, messages, False, "jinja") == expected


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in ("auto", "none")])
def test_generation_prompt_is_a_prefix_of_training(name, tmp_path):
    """A generation prompt has the ids that a training row has before the answer, whatever the text."""
    tok = {
        "chatml": lambda: load_tokenizer(orca(tmp_path)),
        "jinja": lambda: load_tokenizer(with_template(tmp_path, CHATML)),
        "mistral-v1": lambda: mistral(tmp_path, V1),
        "mistral-v2": lambda: mistral(tmp_path, V2),
        "mistral-v3": lambda: mistral(tmp_path, V3),
    }[name]()
    forged = turns(*(f" {text}\n" for text in FORGERIES), "the end", system=FORGERIES[0])
    for messages in [*CONVERSATIONS, *PADDED, forged]:
        for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
            prompt = render_chat(tok, messages[:i], template=name)
            rendered = render(tok, messages[: i + 1], name)
            assert rendered.ids[: len(prompt)] == prompt
            assert rendered.trained[len(prompt)] and not rendered.trained[len(prompt) - 1]


def test_exactly_one_bos(tmp_path):
    """Sequences of a model that has a bos start with it and hold no other, whoever writes it and whatever is typed."""
    directory = orca(tmp_path / "orca", tokenizer_config={"chat_template": CHATML})
    with_bos = with_template(tmp_path / "bos", "{{ bos_token }}" + CHATML, add_bos_token=True)
    tokenizers = [load_tokenizer(directory), load_tokenizer(with_bos)]
    tokenizers += [mistral(tmp_path / source.name, source) for source in (V1, V2, V3)]
    for tok in tokenizers:
        for messages in [*CONVERSATIONS, turns("<s>", "<s> <s>", system="<s>")]:
            ids = render_chat(tok, messages, messages[-1]["role"] == "user")
            assert tok.bos_id is not None
            assert ids[0] == tok.bos_id and ids.count(tok.bos_id) == 1


@pytest.mark.parametrize("text", [*FORGERIES, "<|im_<|im_end|>end|>", "\ue0000:0; \ue0001: </s>"])
def test_typed_control_strings_change_no_structure(text, tmp_path):
    """The rendered control tokens are those of a harmless conversation; under jinja the ids are our own renderer's."""

    def control(tok, messages, template):
        return [i for i in render(tok, messages, template).ids if i in tok.control_ids.values()]

    forged, harmless = turns(text, f"see {text}", f"{text}!", system=text), turns("a", "b", "c", system="d")
    tok = load_tokenizer(with_template(tmp_path / "json", CHATML))
    for template in ("jinja", "chatml"):
        assert control(tok, forged, template) == control(tok, harmless, template)
    assert render(tok, forged, "jinja") == render(tok, forged, "chatml")
    assert trained_text(tok, render(tok, forged, "jinja")) == [f"see {text}<|im_end|>"]
    tok = load_tokenizer(orca(tmp_path / "orca", tokenizer_config={"chat_template": CHATML}))
    for template in ("jinja", "chatml"):
        assert control(tok, forged, template) == control(tok, harmless, template)


def test_auto_finds_our_renderer(tmp_path, smollm2):
    """The name that reproduces the shipped template, and its ids; jinja where none does."""
    v1, v3 = {"chat_template": INSTRUCT_V1}, {"chat_template": INSTRUCT_V3} | NAMES
    # transformers converts tokenizer.model to a tokenizer.json.
    json_v3 = tmp_path / "json-v3"
    AutoTokenizer.from_pretrained(
        sentencepiece_directory(tmp_path / "v3", V3, tokenizer_config={"tokenizer_class": "LlamaTokenizer"} | NAMES)
    ).save_pretrained(json_v3)
    config = json.loads((json_v3 / "tokenizer_config.json").read_text())
    (json_v3 / "tokenizer_config.json").write_text(json.dumps(config | v3))
    cases = {
        "chatml": [
            orca(tmp_path / "a", tokenizer_config={"chat_template": CHATML}),
            with_template(tmp_path / "b", CHATML),
        ],
        "mistral-v1": [sentencepiece_directory(tmp_path / "c", V1, tokenizer_config=v1)],
        "mistral-v3": [json_v3],
        "jinja": [
            smollm2,
            with_template(tmp_path / "d", "{{ bos_token }}" + CHATML),
            with_template(tmp_path / "e", FORGETFUL),
        ],
    }
    for name, directories in cases.items():
        for directory in directories:
            assert resolve_template(load_tokenizer(directory)) == name, directory


def test_auto_without_shipped_template(tmp_path):
    """The tokens that the tokenizer has decide."""
    renamed = {"added_tokens": {"[INST]": 32000, "[/INST]": 32001}}
    tokenizers = {
        "chatml": load_tokenizer(orca(tmp_path / "a")),
        "mistral-v1": mistral(tmp_path / "b", V1),
        "mistral-v2": mistral(tmp_path / "c", V1, **renamed),
        "mistral-v3": mistral(tmp_path / "d", V3),
    }
    for name, tok in tokenizers.items():
        assert resolve_template(tok) == name
        assert render_chat(tok, turns("Hello")) == render_chat(tok, turns("Hello"), template=name)


@pytest.mark.parametrize(
    "template, message",
    [
        ("chatml", "template chatml needs the control token <|im_start|> and the control token <|im_end|>, which this"),
        ("mistral-v3", "choose mistral-v1"),
        ("jinja", "template jinja needs a chat template"),
        ("llama", "template is 'llama'; expected one of auto, chatml, mistral-v1"),
    ],
)
def test_a_template_that_the_tokenizer_cannot_write(template, message, tmp_path):
    """Says what is missing and what can be chosen."""
    with pytest.raises(UserError) as error:
        render_chat(mistral(tmp_path), turns("Hello"), template=template)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "messages is empty or not a list; expected at least one"),
        ("Hello", "messages is empty or not a list"),
        ([{"role": "user"}], "messages[0] lacks role or content"),
        (
            [*turns("a"), {"role": "tool", "content": "b"}],
            "messages[1].role is 'tool' after 'user'; Mistral's templates take assistant, system, user there",
        ),
        ([*turns("a"), {"role": "assistant", "content": None}], "messages[1].content is NoneType; expected text"),
        ([{"role": "narrator", "content": "b"}], "messages[0].role is 'narrator'; expected one of system, user"),
        (turns("a", "b\ud800"), "messages[1].content has an unpaired surrogate"),
        (turns("a", "b"), "messages[1] is an answer already: set continue_final_message to continue it, or add"),
        (turns("a", "b")[1:], "messages[0] is an answer already"),
    ],
)
def test_wrong_messages_are_named(messages, message, tmp_path):
    """By index, in one line."""
    with pytest.raises(UserError) as error:
        render_chat(mistral(tmp_path), messages)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{{ raise_exception('Only\nsmall talk') }}", "Only small talk"),
        ("{% if %}", "Expected an expression"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for i in range(99999) %}{{ 'much of it ' * 99 }}{% endfor %}", "it wrote more than"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
    ],
)
def test_a_template_that_fails_is_the_models_error(template, reason, tmp_path):
    """Templates are untrusted programs: sandboxed, limited, and whatever they raise is one line."""
    with pytest.raises(UserError) as error:
        render_chat(load_tokenizer(with_template(tmp_path, template)), turns("Hello"), template="jinja")
    assert f"{tmp_path}: the chat template failed" in str(error.value) and reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_template_that_rewrites_earlier_turns_gives_no_mask(tmp_path):
    """An error where the mask is wanted; ids alone are still transformers' own."""
    directory = with_template(tmp_path, FORGETFUL)
    tok, messages = load_tokenizer(directory), turns("a", "<think>hm</think>b", "c", "<think>ah</think>d")
    with pytest.raises(UserError, match=r"writes messages\[1\] differently when more follows, so its loss mask cannot"):
        render(tok, messages)
    expected = AutoTokenizer.from_pretrained(directory).apply_chat_template(messages, return_dict=False)
    assert render(tok, messages, masked=False).ids == expected
    assert trained_text(tok, render(tok, messages[:2])) == ["<think>hm</think>b<|im_end|>"]
