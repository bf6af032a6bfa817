"""Templates as models ship them, compared with transformers: ids, masks, ends of answers, headers, tools, time."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from transformers import AutoTokenizer

from minorca import UserError, load_tokenizer, render_chat
from minorca.data import sandbox, spans
from minorca.data.chat_template import render, resolve_template
from minorca.data.visible_text import visible_text
from tests.data.test_chat_template import (
    CHATML,
    CONVERSATIONS,
    FORGETFUL,
    PADDED,
    UNICODE,
    trained_text,
    turns,
    with_template,
)
from tests.data.test_mistral_template import CALL, TOOLS, assistant, result, user
from tests.data.test_tokenizer import NAMES, V1, V3, byte_level, sentencepiece_directory

EACH = "{% for m in messages %}"

# Of each template, what it writes before an answer that a model is prompted with, and what ends an answer.
TEMPLATES = {
    "chatml": (CHATML, "<|im_start|>assistant\n", "<|im_end|>"),
    # Early fine-tunes have no generation prompt.
    "chatml-old": (CHATML.partition("{% if add_gen")[0], "<|im_start|>assistant\n", "<|im_end|>"),
    "trimmed": (
        EACH + "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "zephyr": (
        EACH + "<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "<|assistant|>",
        "</s>",
    ),
    "openchat": (
        "{{ bos_token }}" + EACH + "GPT4 Correct {{ m.role.title() }}: {{ m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}GPT4 Correct Assistant:{% endif %}",
        "GPT4 Correct Assistant:",
        "</s>",
    ),
    "vicuna": (
        EACH + "{{ {'system': '', 'user': 'USER: ', 'assistant': 'ASSISTANT: '}[m.role] + m.content }}"
        "{{ eos_token if m.role == 'assistant' else ' ' }}{% endfor %}",
        "ASSISTANT:",
        "</s>",
    ),
    # What ends an answer is on a line of its own.
    "coder": (
        EACH + "{% if m.role == 'assistant' %}### Response:\n{{ m.content }}\n{{ eos_token }}\n"
        "{% else %}### {{ m.role }}:\n{{ m.content }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:{% endif %}",
        "### Response:",
        "\n</s>",
    ),
    # No end of turn.
    "alpaca": (
        EACH + "{{ {'system': '', 'user': '### Instruction:\n', 'assistant': '### Response:\n'}[m.role] + m.content }}"
        "\n\n{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}",
        "### Response:\n",
        "",
    ),
    "solar": (
        EACH + "### {{ m.role.title() }}:\n{{ m.content }}{% if not loop.last %}\n\n{% endif %}{% endfor %}",
        "\n### Assistant:\n",
        "",
    ),
    # Written in the order of roles, not of messages.
    "system at the end of the user": (
        "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
        + EACH
        + "{% if m.role != 'system' %}"
        "{{ '[INST] ' + system + m.content + ' [/INST]' if m.role == 'user' else m.content + eos_token }}"
        "{% endif %}{% endfor %}",
        "[/INST]",
        "</s>",
    ),
}


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """By template: a byte-level tokenizer with it, read by us and by transformers."""
    directories: dict[str, Path] = {}

    def read(name: str):
        if name not in directories:
            directories[name] = with_template(tmp_path_factory.mktemp("shipped"), TEMPLATES[name][0])
        return load_tokenizer(directories[name]), AutoTokenizer.from_pretrained(directories[name])

    return read


def answers_of(messages: list[dict]) -> list[str]:
    return [m["content"] for m in messages if m["role"] == "assistant"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_transformers_and_masks_are_answers_with_their_ends(name, shipped):
    """Where the template has no end of turn, the last answer gets the tokenizer's, and that is counted."""
    tok, reference = shipped(name)
    _, _, end = TEMPLATES[name]
    for messages in [*CONVERSATIONS, *PADDED[:1]]:
        text = reference.apply_chat_template(messages, tokenize=False)
        expected = reference(text, add_special_tokens=False)["input_ids"]
        rendered = render(tok, messages, "jinja")
        whole = tok.decode(rendered.ids), [i for i in rendered.ids if i in tok.control_ids.values()]
        answers = answers_of(messages)
        if end or not answers or messages[-1]["role"] != "assistant":
            assert whole == (tok.decode(expected), [i for i in expected if i in tok.control_ids.values()])
            assert not rendered.notes
        else:
            written = text[: text.rindex(answers[-1]) + len(answers[-1])]
            assert tok.decode(rendered.ids) == written and rendered.ids[-1] == tok.eos_id
            assert rendered.notes == ["ended with </s>: the template writes no end of turn"]
        ends = [end] * len(answers)
        if answers and not end and messages[-1]["role"] == "assistant":
            ends[-1] = "</s>"
        # White space between the header and the answer is trained; some templates write or remove some.
        found = [run.strip() for run in trained_text(tok, rendered)]
        assert [r.removesuffix(e.strip()).strip() for r, e in zip(found, ends, strict=True)] == [
            a.strip() for a in answers
        ]
        assert all(run.endswith(e.strip()) for run, e in zip(found, ends))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_ends_in_the_header_and_starts_the_training_row(name, shipped):
    """Also of a template without a generation prompt: what it writes before an answer is its header."""
    tok, reference = shipped(name)
    header = TEMPLATES[name][1]
    for messages in [*CONVERSATIONS, *PADDED[:1]]:
        for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
            prompt = render_chat(tok, messages[:i], template="jinja")
            text = reference.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
            assert visible_text(tok, prompt).rstrip("\n").endswith(header.rstrip("\n"))
            assert visible_text(tok, prompt).startswith(text)
            row = render(tok, messages[: i + 1], "jinja")
            assert row.ids[: len(prompt)] == prompt
            assert row.trained[len(prompt)] and not row.trained[len(prompt) - 1]


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_is_continued_as_transformers_does(name, shipped):
    """`continue_final_message`: the text up to the end of the content, without an end of turn."""
    tok, reference = shipped(name)
    for beginning in ("Once upon", " a time\n", "x"):
        messages = [*turns("Tell.", "No.", "Please."), {"role": "assistant", "content": beginning}]
        text = reference.apply_chat_template(messages, tokenize=False, continue_final_message=True)
        ids = render_chat(tok, messages, template="jinja", continue_final_message=True)
        assert visible_text(tok, ids) == text
        header = render_chat(tok, messages[:-1], template="jinja")
        assert ids[: len(header)] == header


@pytest.mark.parametrize("template", ["auto", "jinja", "chatml"])
def test_what_is_no_beginning_is_refused(template, tmp_path):
    tok = load_tokenizer(with_template(tmp_path, CHATML))
    with pytest.raises(UserError, match=r"^messages\[1\] is an answer already: set continue_final_message"):
        render_chat(tok, turns("q", "a"), template=template)
    with pytest.raises(UserError, match=r"^messages\[0\] is no answer that could be continued"):
        render_chat(tok, turns("q"), template=template, continue_final_message=True)
    with pytest.raises(UserError, match=r"^messages\[0\] is an answer already"):
        render_chat(tok, turns("q", "a")[1:], template=template)
    empty = [*turns("q"), {"role": "assistant", "content": ""}]
    continued = render_chat(tok, empty, template=template, continue_final_message=True)
    assert continued == render_chat(tok, turns("q"), template=template)


def test_an_answer_that_ends_in_another_control_token(tmp_path):
    """It is trained as the template writes it, and counted, since nothing would stop a generation there."""
    template = EACH + "{{ m.role }}: {{ m.content }}<unk>\n{% endfor %}"
    rendered = render(tok := load_tokenizer(with_template(tmp_path, template)), turns("a", "b", "c", "d"), "jinja")
    assert rendered.notes == ["with an answer that ends in <unk>, which does not end a generation"]
    assert trained_text(tok, rendered)[-1].strip() == "d<unk>"


def test_a_model_without_an_end_of_sequence(tmp_path):
    directory = with_template(tmp_path, EACH + "{{ m.content }}\n{% endfor %}", bos_token=None, eos_token=None)
    tok = load_tokenizer(directory)
    tok.stop_ids = set()
    rendered = render(tok, turns("a", "b"), "jinja")
    assert rendered.notes == ["with an answer that nothing ends: the model has no end of sequence"]
    assert trained_text(tok, rendered) == ["b"]


def test_an_end_is_trained_under_train_on_all_too(tmp_path):
    tok = load_tokenizer(with_template(tmp_path, TEMPLATES["alpaca"][0]))
    assert render(tok, turns("a", "b"), "jinja", masked=False).ids[-1] == tok.eos_id


def test_answers_that_differ_when_more_follows_are_no_problem_at_the_end(tmp_path):
    """Only the last answer of a template that removes thoughts is as it was; the others need a weight of 0."""
    tok = load_tokenizer(with_template(tmp_path, FORGETFUL))
    messages = turns("a", "<think>hm</think>b", "c", "<think>ah</think>d")
    messages[1]["weight"] = 0
    assert trained_text(tok, render(tok, messages, "jinja")) == ["<think>ah</think>d<|im_end|>"]


HERMES = (
    "{% if tools %}<|im_start|>system\nTools: {% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>tool\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n{% elif m.tool_calls %}<|im_start|>assistant\n{{ m.content }}"
    "{% for c in m.tool_calls %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_tools_are_what_transformers_makes_of_them(tmp_path):
    """Schemas, calls and results; calls and answers are trained with their ends, results and schemas are not."""
    directory = with_template(tmp_path, HERMES)
    tok, reference = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    call = CALL | {"function": {"name": "add", "arguments": {"a": 2, "b": "</s>"}}}
    messages = [user("2 + 2?"), assistant("", call), result("4 <|im_end|>"), assistant("Four."), user("Thanks")]
    # Typed control strings stay text for us, so they are compared as text.
    expected = reference.apply_chat_template(messages, tools=TOOLS, tokenize=False)
    rendered = render(tok, messages, "jinja", tools=TOOLS)
    assert visible_text(tok, rendered.ids).replace("\\", "") == expected
    assert trained_text(tok, rendered) == [
        '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": "</s>"}}\n</tool_call><|im_end|>',
        "Four.<|im_end|>",
    ]
    control = [i for i in rendered.ids if i in (tok.control_ids["</s>"], tok.control_ids["<|im_end|>"])]
    assert len(control) == len(messages) + 1 and tok.control_ids["</s>"] not in control
    # A template that writes tools is not taken for our ChatML, which cannot.
    assert resolve_template(tok) == "jinja"
    prompt = render_chat(tok, messages[:3], tools=TOOLS)
    assert visible_text(tok, prompt).replace("\\", "") == reference.apply_chat_template(
        messages[:3], tools=TOOLS, tokenize=False, add_generation_prompt=True
    )
    assert rendered.ids[: len(prompt)] == prompt
    with pytest.raises(UserError, match=r"^messages has tools, which chatml cannot write; choose jinja or mistral-v3"):
        render(tok, messages, "chatml", tools=TOOLS)


def test_tools_take_the_template_that_is_named_for_them(tmp_path):
    """As in transformers, which finds it by that name."""
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": HERMES}]
    directory = byte_level(tmp_path, tokenizer_config=NAMES | {"chat_template": named})
    tok, reference = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    for tools in (TOOLS, None):
        expected = reference.apply_chat_template([user()], tools=tools, tokenize=False, add_generation_prompt=True)
        ids = render_chat(tok, [user()], template="jinja", tools=tools)
        assert visible_text(tok, ids) == expected and ("Tools:" in expected) == bool(tools)


@pytest.mark.parametrize("template", [CHATML, TEMPLATES["solar"][0], FORGETFUL], ids=["chatml", "solar", "forgetful"])
def test_templates_are_rendered_a_few_times_however_many_turns(template, tmp_path, monkeypatch):
    """A conversation of 1,600 turns too; answers that have to be searched for are bounded."""
    tok = load_tokenizer(with_template(tmp_path, template))
    render(tok, turns("a", "b"), "jinja")
    calls: list[int] = []
    write: Callable = sandbox.render

    def counted(*given):
        calls.append(1)
        return write(*given)

    monkeypatch.setattr(sandbox, "render", counted)
    messages = turns(*("<think>hm</think>word" for _ in range(1600)))
    if template != FORGETFUL:
        rendered = render(tok, messages, "jinja")
        assert len(trained_text(tok, rendered)) == 800 and len(calls) == 2
        return
    with pytest.raises(UserError, match=r"writes messages\[1\] differently"):
        render(tok, messages, "jinja")
    for message in messages[1:-1:2]:
        message["weight"] = 0
    calls.clear()
    assert trained_text(tok, render(tok, messages, "jinja")) == ["<think>hm</think>word<|im_end|>"]
    assert len(calls) < 2 * 64 + 5


@pytest.mark.parametrize("source", ["byte-level", "sentencepiece"])
@pytest.mark.parametrize("name", ["solar", "alpaca", "vicuna"])
def test_a_long_text_without_control_tokens_has_the_ids_of_the_whole(name, source, tmp_path, monkeypatch):
    """Of which each part is encoded with the text just before it; and where a token would cross a border."""
    template = TEMPLATES[name][0].replace("eos_token", "''").replace("{{ bos_token }}", "")
    directory = (
        with_template(tmp_path, template)
        if source == "byte-level"
        else sentencepiece_directory(tmp_path, V1, tokenizer_config=NAMES | {"chat_template": template})
    )
    tok = load_tokenizer(directory)
    words = ["The quick brown fox\n", "\n\n jumps ", "over 日本語", "  the lazy dog's 12345", "x" * 40]
    messages = turns(*(" ".join(words[(i * k) % 5] for k in range(1, 30)) for i in range(1, 61)))
    once = render(tok, messages, "jinja")
    monkeypatch.setattr(spans, "CONTEXT", 10**9)
    assert once == render(tok, messages, "jinja")


# ------------------------------------------------------------------------------------------------------ Mistral's own

# The newer templates of Mistral's Instruct models: the system prompt in the last message, if that is the user's.
SYSTEM_LAST = (
    "{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{%- else %}{% set rest = messages %}{% endif %}{{- bos_token }}{%- for m in rest %}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{%- if m.role == 'user' %}{%- if loop.last and system is defined %}{{- '[INST]S' + system + '\n\n' + m.content + "
    "'E[/INST]' }}{%- else %}{{- '[INST]S' + m.content + 'E[/INST]' }}{%- endif %}"
    "{%- else %}{{- 'S' + m.content + eos_token }}{%- endif %}{%- endfor %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST]S' + m.content + 'E[/INST]' }}{% else %}{{ 'A' + m.content + eos_token }}"
    "{% endif %}{% endfor %}"
)
# v1 has spaces on both sides of a question; the shipped templates differ in those before answers and questions.
SHIPPED = {
    "v0.1": (V1, NO_SYSTEM.replace("S'", " '").replace("'E", "' ").replace("'A'", "''"), "mistral-v1"),
    "v0.2": (V1, SYSTEM_LAST.replace("loop.last", "loop.first").replace("S'", " '").replace("'E", "' "), "mistral-v1"),
    "v0.3": (V3, SYSTEM_LAST.replace("S'", " '").replace("'E", "'"), "mistral-v3"),
    "v0.3, old": (V3, NO_SYSTEM.replace("S'", " '").replace("'E", "'").replace("'A'", "' '"), "mistral-v3"),
    "no spaces": (V3, SYSTEM_LAST.replace("S'", "'").replace("'E", "'"), "mistral-v3"),
}


@pytest.mark.parametrize("form", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("name", SHIPPED)
def test_mistrals_own_models_take_what_their_reference_writes(name, form, tmp_path):
    """Rows with a system prompt under `auto`, though the shipped templates drop or reject it."""
    source, template, expected_name = SHIPPED[name]
    config = {"tokenizer_class": "LlamaTokenizer", "chat_template": template} | NAMES
    directory = sentencepiece_directory(tmp_path / "model", source, tokenizer_config=config)
    if form == "tokenizer.json":
        AutoTokenizer.from_pretrained(directory).save_pretrained(tmp_path / "json")
        directory = tmp_path / "json"
        settings = json.loads((directory / "tokenizer_config.json").read_text())
        (directory / "tokenizer_config.json").write_text(json.dumps(settings | config))
    tok = load_tokenizer(directory)
    assert resolve_template(tok) == expected_name
    reference = MistralTokenizer.from_file(str(source), mode=ValidationMode.agnostic)
    conversations: list[list] = CONVERSATIONS
    for messages in conversations:
        if form == "tokenizer.json" and UNICODE in messages[0]["content"]:
            # transformers' conversion encodes runs of spaces otherwise than SentencePiece does.
            continue
        expected = reference.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
        assert render(tok, messages).ids == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}" + EACH + "{{ {'user': '[INST] ' + m.content + ' [/INST]', 'system': '<<SYS>>' + m.content, "
        "'assistant': m.content + eos_token}[m.role] }}{% endfor %}",
        "{{ bos_token }}" + EACH + "{{ {'user': '[INST] ' + m.content + '[/INST]', 'assistant': m.content + eos_token, "
        "'system': '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]'}[m.role] }}{% endfor %}",
        FORGETFUL.replace("<|im_start|>", "[INST]"),
    ],
    ids=["llama-2", "v7", "forgetful"],
)
def test_other_templates_with_inst_are_not_taken_for_mistrals(template, tmp_path):
    config = {"chat_template": template} | NAMES
    assert resolve_template(load_tokenizer(sentencepiece_directory(tmp_path, V3, tokenizer_config=config))) == "jinja"


def test_a_row_that_the_shipped_template_rejects_names_the_template_that_can(tmp_path):
    config = {"chat_template": SHIPPED["v0.3, old"][1]} | NAMES
    tok = load_tokenizer(sentencepiece_directory(tmp_path, V3, tokenizer_config=config))
    with pytest.raises(UserError) as caught:
        render(tok, turns("Hi", "Hello", system="Be brief."), "jinja")
    assert str(caught.value).endswith("; mistral-v3 can write it: data.template, or --template")


def test_a_message_that_the_template_drops_is_counted(tmp_path):
    """Under jinja, which is what was asked for."""
    config = {"chat_template": SHIPPED["v0.3"][1]} | NAMES
    tok = load_tokenizer(sentencepiece_directory(tmp_path, V3, tokenizer_config=config))
    rendered = render(tok, turns("Hi", "Hello", system="Be brief."), "jinja")
    assert "brief" not in tok.decode(rendered.ids)
    assert rendered.notes == ["with a system message that the template does not write"]


@pytest.mark.parametrize(
    "template, message, problem",
    [
        # ChatML has no form for tools.
        (CHATML, assistant("", CALL), "does not write the tool calls of messages[1]; choose another template"),
        (CHATML, assistant("I call.", CALL), "does not write the tool calls of messages[1]"),
        # YandexGPT's writes the header in place of an answer at the end.
        (
            EACH + "{% if m.role == 'assistant' and loop.last %}Bot:[SEP]{% else %}{{ m.content }}\n{% endif %}"
            "{% endfor %}{% if add_generation_prompt %}Bot:[SEP]{% endif %}",
            assistant("Hello"),
            "does not write messages[1]; choose another template",
        ),
    ],
)
def test_an_answer_that_the_template_drops_is_not_trained_as_an_empty_one(template, message, problem, tmp_path):
    tok = load_tokenizer(with_template(tmp_path, template))
    with pytest.raises(UserError) as caught:
        render(tok, [user("Hi"), message], "jinja")
    assert problem in str(caught.value)
    assert not any(render(tok, [user("Hi"), message | {"weight": 0}], "jinja").trained)
    assert (
        "with an answer that the template does not write as it is"
        in render(tok, [user("Hi"), message], "jinja", masked=False).notes
    )


def test_calls_are_found_where_tools_are_before_the_last_question(tmp_path):
    """As in Nemo's template: what precedes a call is another text once a question follows."""
    template = (
        EACH + "{% if m.role == 'user' %}{% if tools and m == (messages | selectattr('role', 'equalto', 'user') | list)"
        "[-1] %}TOOLS {{ tools | tojson }}{% endif %}[INST]{{ m.content }}[/INST]"
        "{% elif m.role == 'tool' %}[RESULT]{{ m.content }}[/RESULT]"
        "{% elif m.tool_calls %}[CALLS]{{ m.tool_calls[0].function | tojson + eos_token }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    )
    directory = with_template(tmp_path, template)
    tok, reference = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    once = [assistant("", CALL), result("4"), assistant("Four.")]
    messages = [user("first"), *once, user("again"), *once, user("thanks"), assistant("Bye.")]
    rendered = render(tok, messages, "jinja", tools=TOOLS)
    assert visible_text(tok, rendered.ids) == reference.apply_chat_template(messages, tools=TOOLS, tokenize=False)
    call = "[CALLS]" + json.dumps(CALL["function"], ensure_ascii=False) + "</s>"
    assert trained_text(tok, rendered) == [call, "Four.</s>", call, "Four.</s>", "Bye.</s>"]
    assert rendered.notes == []


def test_how_many_answers_are_searched(tmp_path):
    """An answer that the template rewrites is found by rendering what precedes it; many would take long."""
    tok = load_tokenizer(with_template(tmp_path, CHATML.replace("message['content']", "(message['content'] | upper)")))
    assert len(trained_text(tok, render(tok, turns(*["a", "b"] * 64), "jinja"))) == 64
    with pytest.raises(UserError, match="more than 64 answers make calls, or are rewritten by the chat template; choo"):
        render(tok, turns(*["a", "b"] * 65), "jinja")


def test_answers_that_the_template_changes_are_counted(tmp_path):
    """A template that removes thoughts, one that writes an empty thought, and one that writes JSON, which does not."""
    cut = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
    tok = load_tokenizer(with_template(tmp_path / "cut", cut))
    rendered = render(tok, turns("a", "<think>hm</think>b"), "jinja")
    assert trained_text(tok, rendered) == ["b<|im_end|>"]
    assert rendered.notes == ["with an answer that the template does not write as it is"]
    thinking = EACH + "<|im_start|>{{ m.role }}\n{{ '<think>\n</think>\n' if m.role == 'assistant' }}{{ m.content }}"
    thinking += "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    tok = load_tokenizer(with_template(tmp_path / "thinking", thinking))
    rendered = render(tok, turns("a", "b"), "jinja")
    assert trained_text(tok, rendered) == ["b<|im_end|>"]
    assert rendered.notes == ["with an answer after other text than the generation prompt"]
    in_json = EACH + "{{ (m.content | tojson if m.role == 'user' else m.content) + eos_token }}{% endfor %}"
    tok = load_tokenizer(with_template(tmp_path / "json", in_json))
    assert render(tok, turns('say "é"', "b"), "jinja").notes == []


def test_prompt_and_completion_without_a_template(tmp_path):
    """TRL's rule: the ids of both as one text, the completion's are trained, and the end of sequence after it."""
    tok = load_tokenizer(sentencepiece_directory(tmp_path, V1, tokenizer_config=NAMES))
    reference = AutoTokenizer.from_pretrained(
        sentencepiece_directory(tmp_path / "hf", V1, tokenizer_config={"tokenizer_class": "LlamaTokenizer"} | NAMES)
    )
    for prompt, completion in [("Q: 2 + 2?\nA:", " 4"), ("[INST] a [/INST]", " b</s>"), ("x\n", "y")]:
        whole = reference(prompt + completion, add_special_tokens=False)["input_ids"]
        expected = [1] * (whole[0] != 1) + whole + [2] * (whole[-1] != 2)
        rendered = render(tok, turns(prompt, completion), "none")
        assert rendered.ids == expected
        asked = render_chat(tok, turns(prompt), template="none")
        assert rendered.ids[: len(asked)] == asked and rendered.trained == [False] * len(asked) + [True] * (
            len(expected) - len(asked)
        )
    typed = render(tok, turns("a</s>", "b"), "none", parse_control=False)
    assert typed.ids.count(2) == 1
    with pytest.raises(UserError, match="messages has system, user, assistant; template none writes a prompt"):
        render(tok, turns("a", "b", system="c"), "none")
