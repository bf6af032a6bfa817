"""Conversations to token ids and a loss mask, made together.

A message is {"role": "system" | "user" | "assistant", "content": text}. Training and generation call the same renderer,
and an answer's ids start where its generation prompt's ids end, so the model is asked exactly what it was taught.
An answer may have "weight": 0, which excludes it from the loss mask and leaves its ids unchanged.

chatml      `<|im_start|>role\\ncontent<|im_end|>\\n`; the answer encoded on its own, as Mistral-7B-OpenOrca was trained
            (axolotl, prompt_strategies/alpaca_w_system.py)
mistral-v1  `[INST] content [/INST]answer</s>` in text, the system prompt before the first user message
mistral-v2  [INST] and [/INST] are control tokens, the system prompt before the last user message
mistral-v3  the same except for tools, which are not supported; all three as in mistral-common,
            tokens/tokenizers/instruct.py
jinja       the template that the model ships, in a sandbox (sandbox.py)
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from math import inf
from typing import cast

from minorca.data import sandbox
from minorca.data.tokenizer import SURROGATE, Tokenizer
from minorca.errors import UserError

# In the order in which `auto` tries them.
BUILT_IN = ("chatml", "mistral-v3", "mistral-v2", "mistral-v1")
TEMPLATES = ("auto", *sorted(BUILT_IN), "jinja")
REQUIRED_TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "mistral-v2": ("[INST]", "[/INST]"),
    "mistral-v3": ("[INST]", "[/INST]"),
}

# Parts of a rendered conversation: ids, and whether they are trained.
Pieces = list[tuple[list[int], bool]]


@dataclass
class Rendered:
    """A conversation's ids, and whether each is trained: an answer's content and the token that ends its turn."""

    ids: list[int]
    trained: list[bool]


def render_chat(
    tok: Tokenizer,
    messages: list[dict],
    add_generation_prompt: bool = True,
    template: str = "auto",
    max_ids: float = inf,
) -> list[int]:
    """The ids of a conversation, by default with the header that asks for an answer. Arguments and errors: `render`."""
    return render(tok, messages, template, add_generation_prompt, masked=False, max_ids=max_ids).ids


def render(
    tok: Tokenizer,
    messages: list[dict],
    template: str = "auto",
    add_generation_prompt: bool = False,
    masked: bool = True,
    max_ids: float = inf,
) -> Rendered:
    """The ids of a conversation and its loss mask.

    Args:
        masked: False if the mask will not be used; a Jinja template that allows no mask is then accepted.
        max_ids: without a mask, the number of ids above which the caller rejects the conversation. A longer one is not
            rendered answer by answer, so its ids may differ where answers start.

    Raises:
        UserError: an invalid message (`field` gives its index), a template that this tokenizer cannot write, a shipped
            template that fails or whose loss mask cannot be determined.
    """
    template = resolve_template(tok, template)
    _check_messages(messages, template)
    if template == "jinja":
        return _jinja(tok, messages, add_generation_prompt, masked, max_ids)
    if template == "chatml":
        pieces = _chatml(tok, messages, add_generation_prompt)
    else:
        pieces = _mistral(tok, messages, template)
    return Rendered([i for ids, _ in pieces for i in ids], [trained for ids, trained in pieces for _ in ids])


def resolve_template(tok: Tokenizer, template: str = "auto") -> str:
    """The template's name, with `auto` resolved.

    `auto` is the built-in template that writes what the model's own template writes, else jinja. For a model without a
    template, it is the built-in one whose control tokens the tokenizer has.

    Raises:
        UserError: an unknown name, or a template that `tok` cannot write.
    """
    if template == "auto":
        return _auto(tok)
    if template not in TEMPLATES:
        raise UserError(f"is {template!r}; expected one of {', '.join(TEMPLATES)}", field="template")
    if missing := _missing(tok, template):
        possible = [name for name in (*BUILT_IN, "jinja") if not _missing(tok, name)]
        raise UserError(
            f"template {template} needs {missing}, which this model lacks; "
            f"choose {' or '.join(possible) or 'a model that has it'}",
            path=tok.path,
        )
    return template


def _missing(tok: Tokenizer, template: str) -> str:
    """What `template` needs and `tok` lacks, in words; empty if nothing."""
    required = REQUIRED_TOKENS.get(template, ())
    missing = [f"the control token {token}" for token in required if token not in tok.control_ids]
    if template.startswith("mistral"):
        missing += [name for name, i in (("a bos token", tok.bos_id), ("an eos token", tok.eos_id)) if i is None]
    if template == "jinja" and tok.chat_template is None:
        missing.append("a chat template (chat_template.jinja, or chat_template in tokenizer_config.json)")
    return " and ".join(missing)


# Servers resolve it for every request, and it renders a dozen probes.
@lru_cache(maxsize=8)
def _auto(tok: Tokenizer) -> str:
    possible = [name for name in BUILT_IN if not _missing(tok, name)]
    if "[TOOL_CALLS]" not in tok.control_ids and "mistral-v2" in possible:
        # The two differ in tools alone, which came with that token.
        possible.remove("mistral-v3")
    if tok.chat_template is not None:
        return next((name for name in possible if _reproduces(tok, name)), "jinja")
    if not possible:
        raise UserError(
            "the model ships no chat template, and its tokenizer lacks the control tokens of every built-in one; "
            "add a chat_template.jinja",
            path=tok.path,
        )
    return possible[0]


def _reproduces(tok: Tokenizer, template: str) -> bool:
    """Whether the built-in `template` writes what the shipped one does.

    It must do so for every probe that the shipped template accepts (some reject a system message), and at least one
    must be accepted. Both are split where answers start; the bos token may be left to the tokenizer.
    The probes contain what templates are known to drop: white space at an end, and the thoughts of earlier answers.
    """
    system = {"role": "system", "content": "You are a helpful assistant."}
    user = {"role": "user", "content": "What is 2 + 2?\n"}
    answer = {"role": "assistant", "content": "<think>Two twos</think>It is 4."}
    again = {"role": "user", "content": "And 3 + 3?"}
    probes = [
        ([user], True),
        ([system, user], True),
        ([user, answer, again], True),
        ([user, answer], False),
        ([system, user, answer, again], True),
        ([system, user, answer, again, answer], False),
    ]
    accepted = False
    for messages, prompt in probes:
        try:
            spans, encode = _spans(tok, messages, prompt, masked=False)
        except UserError:
            continue
        shipped = [i for text, _ in spans for i in encode(text)]
        if tok.adds_bos and shipped[:1] != [tok.bos_id]:
            shipped = [tok.bos_id, *shipped]
        if shipped != render(tok, messages, template, prompt).ids:
            return False
        accepted = True
    return accepted


def _check_messages(messages: list[dict], template: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise UserError('is empty or not a list; expected at least one {"role": ..., "content": ...}', field="messages")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError('lacks role or content; expected {"role": ..., "content": ...}', field=f"messages[{i}]")
        role = message["role"]
        content = message["content"]
        if role not in ("system", "user", "assistant"):
            raise UserError(f"is {role!r}; expected system, user or assistant", field=f"messages[{i}].role")
        if not isinstance(content, str):
            raise UserError(f"is {type(content).__name__}; expected text", field=f"messages[{i}].content")
        if SURROGATE.search(content):
            raise UserError(
                "has an unpaired surrogate, which is not valid Unicode; fix the text", field=f"messages[{i}].content"
            )
        if role == "system" and i > 0:
            raise UserError("is a system message; it must come first", field=f"messages[{i}]")
    if template.startswith("mistral"):
        _check_alternation(messages, template)


def _check_alternation(messages: list[dict], template: str) -> None:
    """Mistral's templates have no other order than user and assistant in turn, after an optional system message."""
    first = int(messages[0]["role"] == "system")
    if first == len(messages):
        raise UserError(
            f"is a system message, which {template} writes into a user message, and none follows", field="messages[0]"
        )
    for i in range(first, len(messages)):
        if messages[i]["role"] != ("user", "assistant")[(i - first) % 2]:
            raise UserError(
                f"is {messages[i]['role']!r}; {template} needs user and assistant in turn, user first: join messages "
                f"or drop one",
                field=f"messages[{i}].role",
            )


def _in_loss(message: dict) -> bool:
    return message["role"] == "assistant" and message.get("weight") != 0


def _chatml(tok: Tokenizer, messages: list[dict], add_generation_prompt: bool) -> Pieces:
    start = tok.control_ids["<|im_start|>"]
    end = tok.control_ids["<|im_end|>"]
    prompt = [start, *tok.encode("assistant\n")]
    newline = tok.encode("\n")
    pieces: Pieces = [([cast(int, tok.bos_id)], False)] if tok.adds_bos else []
    for message in messages:
        role = message["role"]
        content = message["content"]
        if role == "assistant":
            pieces += [(prompt, False), ([*tok.encode(content), end], _in_loss(message)), (newline, False)]
        elif role == "user" or content:
            # An empty system prompt is not written.
            pieces.append(([start, *tok.encode(f"{role}\n{content}"), end, *newline], False))
    if add_generation_prompt:
        pieces.append((prompt, False))
    return pieces


def _mistral(tok: Tokenizer, messages: list[dict], template: str) -> Pieces:
    """Without a parameter for the generation prompt: the end of a user message is the prompt."""
    v1 = template == "mistral-v1"
    system = ""
    turns = messages
    if messages[0]["role"] == "system":
        system = messages[0]["content"]
        turns = messages[1:]
    # The turn that carries the system prompt: the first or the last user message.
    carrier = 0 if v1 else (len(turns) - 1) // 2 * 2
    # `resolve_template` has checked that there are both.
    bos_id = cast(int, tok.bos_id)
    eos_id = cast(int, tok.eos_id)
    pieces: Pieces = [([bos_id], False)]
    for i, turn in enumerate(turns):
        content = turn["content"]
        if i % 2:
            pieces.append(([*tok.encode(content if v1 else content.rstrip(" ")), eos_id], _in_loss(turn)))
            continue
        if system and i == carrier:
            content = f"{system}\n\n{content}"
        if v1:
            pieces.append((tok.encode(f"[INST] {content} [/INST]"), False))
        else:
            pieces.append(([tok.control_ids["[INST]"], *tok.encode(content), tok.control_ids["[/INST]"]], False))
    return pieces


def _jinja(tok: Tokenizer, messages: list[dict], add_generation_prompt: bool, masked: bool, max_ids: float) -> Rendered:
    """The shipped template's text, encoded as a whole as transformers does, except where a token would cross a border.

    What precedes a border between prompt and answer keeps its ids: where a token reaches across it (into an answer's
    leading newline, say), it is split there, or the generation prompt would not be a prefix of the training row.
    """
    spans, encode = _spans(tok, messages, add_generation_prompt, masked, max_ids)
    encode_prefix = _incremental_encoder(tok, encode)
    ids = []
    trained = []
    prefix = ""
    for text, is_trained in spans:
        prefix += text
        together = encode_prefix(prefix)
        if together[: len(ids)] != ids:
            together = ids + encode(text)
        trained += [is_trained] * (len(together) - len(ids))
        ids = together
    return Rendered(ids, trained)


def _incremental_encoder(tok: Tokenizer, encode: Callable[[str], list[int]]) -> Callable[[str], list[int]]:
    """`encode` for texts of which each starts with the one before, without encoding the common part again.

    Only what follows a control string near the end of the earlier text is encoded again. Tokenizers split at control
    strings first, so the ids before one do not change.

    The later part is encoded with its control string in front, which may absorb white space after it, and without which
    some tokenizers would see the start of a text. Tokenizers that find control strings otherwise (only between words,
    or in a normalized text) encode everything again.
    """
    longest = max(map(len, tok.control_ids), default=0)
    # The ids up to and including a control string, and where that string starts in the text.
    head = []
    start = 0

    @lru_cache
    def splits(control: str) -> bool:
        whole = tok.encode_template(f"a{control}a")
        front = tok.encode_template(f"a{control}")
        back = tok.encode_template(f"{control}a")
        return whole == front + back[1:]

    def encode_prefix(text: str) -> list[int]:
        nonlocal head, start
        # The control string's id is in `head` already.
        skipped = 1 if head else 0
        ids = head + encode(text[start:])[skipped:]
        end = start
        cut = None
        for n, piece in enumerate(tok.split_control(text[start:])):
            end += len(piece)
            # A string near the end may turn out to be part of a longer one.
            if n % 2 and end - len(piece) + longest < len(text) and splits(piece):
                cut = (end - len(piece), end)
        if cut:
            head = head + encode(text[start : cut[1]])[skipped:]
            start = cut[0]
        return ids

    return encode_prefix


def _spans(
    tok: Tokenizer, messages: list[dict], add_generation_prompt: bool, masked: bool, max_ids: float = inf
) -> tuple[list[tuple[str, bool]], Callable[[str], list[int]]]:
    """The shipped template's text in spans (text, trained), and the function that encodes such text.

    An answer is trained from the end of its generation prompt to the first token that stops a generation.
    """
    in_loss = [_in_loss(message) for message in messages]
    messages, encode = _hide_control(tok, messages)
    stops = [re.escape(token) for token, i in tok.control_ids.items() if i in tok.stop_ids]
    stop = re.compile("|".join(stops) or "(?!)")
    full = _render_text(tok, messages, add_generation_prompt)
    if not masked and max_ids < inf and len(encode(full)) > max_ids:
        return [(full, False)], encode
    spans = []
    done = 0
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    try:
        for i in answers:
            before = _render_text(tok, messages[:i], True)
            through = _render_text(tok, messages[: i + 1], False)
            ending = stop.search(through, len(before))
            end = ending.end() if ending else len(through)
            if not (through.startswith(before) and full.startswith(through[:end]) and done <= len(before)):
                if not in_loss[i]:
                    continue
                raise UserError(
                    f"the chat template writes messages[{i}] differently when more follows, so its loss mask cannot be "
                    f"determined; choose another template or train_on: all, or give that message the weight 0",
                    path=tok.path,
                )
            spans += [(full[done : len(before)], False), (full[len(before) : end], in_loss[i])]
            done = end
    except UserError:
        if masked:
            raise
        return [(full, False)], encode
    return spans + [(full[done:], False)], encode


def _hide_control(tok: Tokenizer, messages: list[dict]) -> tuple[list[dict], Callable[[str], list[int]]]:
    """The messages with a placeholder for each control string in their content, and the function that encodes the
    template's text: a control string in that text is the template's own, a typed one becomes ordinary tokens.
    """
    marks = (f"\ue000{n}:" for n in count())
    mark = next(mark for mark in marks if not any(mark in m["content"] for m in messages))
    placeholder = re.compile(mark + r"(\d+);")
    typed: list[str] = []

    def hide(match: re.Match) -> str:
        typed.append(match[0])
        return f"{mark}{len(typed) - 1};"

    def encode(text: str) -> list[int]:
        if mark not in text:
            return tok.encode_template(text)
        ids = []
        for n, piece in enumerate(tok.split_control(text)):
            piece = placeholder.sub(lambda match: typed[int(match[1])], piece)
            ids += [tok.control_ids[piece]] if n % 2 else tok.encode(piece)
        return ids

    # Only role and content are passed on: other fields were not checked.
    hidden = [{"role": m["role"], "content": tok.replace_control(m["content"], hide)} for m in messages]
    return hidden, encode


def _render_text(tok: Tokenizer, messages: list[dict], add_generation_prompt: bool) -> str:
    names = {i: token for token, i in tok.control_ids.items()}
    # A token that does not exist stays undefined in the template.
    special_ids = (("bos_token", tok.bos_id), ("eos_token", tok.eos_id))
    special = {name: names[i] for name, i in special_ids if i is not None and i in names}
    variables = {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}
    # A template may write in a loop for a long time.
    limit = 2**20 + 16 * sum(len(message["content"]) for message in messages)
    try:
        return sandbox.render(cast(str, tok.chat_template), variables | special, limit)
    except sandbox.TemplateFailed as failed:
        raise UserError(
            f"the chat template failed: {failed}; fix the messages, or choose another template", path=tok.path
        ) from None
