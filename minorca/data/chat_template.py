"""Conversations to token ids and a loss mask, made together.

A message is {"role": "system" | "user" | "assistant", "content": text}. Training and generation call the same renderer,
and an answer's ids start where its generation prompt's ids end, so the model is asked exactly what it was taught.
An answer may have "weight": 0; then the mask leaves it out, and its ids are the same.

chatml      `<|im_start|>role\\ncontent<|im_end|>\\n`; the answer encoded on its own, as Mistral-7B-OpenOrca was trained
            (axolotl, prompt_strategies/alpaca_w_system.py)
mistral-v1  `[INST] content [/INST]answer</s>` in text, the system prompt before the first user message
mistral-v2  [INST] and [/INST] are control tokens, the system prompt before the last user message
mistral-v3  the same but for tools, which we do not write; all three as in mistral-common, tokens/tokenizers/instruct.py
jinja       the template that the model ships, in a sandbox (sandbox.py)
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from math import inf

from minorca.data import sandbox
from minorca.data.tokenizer import Tokenizer
from minorca.errors import UserError

OURS = ("chatml", "mistral-v3", "mistral-v2", "mistral-v1")  # in the order that `auto` tries them
TEMPLATES = ("auto", *sorted(OURS), "jinja")
INST = ("[INST]", "[/INST]")
NEEDS = {"chatml": ("<|im_start|>", "<|im_end|>"), "mistral-v2": INST, "mistral-v3": INST}


@dataclass
class Rendered:
    """A conversation's ids, and whether each is trained on: an answer's content and the token that ends its turn."""

    ids: list[int]
    trained: list[bool]


def render_chat(
    tok: Tokenizer, messages: list[dict], add_generation_prompt: bool = True, template: str = "auto", most: float = inf
) -> list[int]:
    """The ids of a conversation, by default with the header that asks for an answer. Raises UserError as `render`."""
    return render(tok, messages, template, add_generation_prompt, masked=False, most=most).ids


def render(
    tok: Tokenizer,
    messages: list[dict],
    template: str = "auto",
    add_generation_prompt: bool = False,
    masked: bool = True,
    most: float = inf,
) -> Rendered:
    """The ids of a conversation and its loss mask.

    masked: False where the mask will not be used; then a Jinja template for which none can be made is no error.
    most: without a mask, a conversation of more ids than this is too long for the caller, and is not rendered answer by
    answer; its ids may differ where answers start.
    Raises UserError: a message that is wrong (it names its index), a template that this tokenizer cannot write, a
    shipped template that fails or that gives no mask.
    """
    template = resolve_template(tok, template)
    _check(messages, template)
    if template == "jinja":
        return _jinja(tok, messages, add_generation_prompt, masked, most)
    if template == "chatml":
        pieces = _chatml(tok, messages, add_generation_prompt)
    else:
        pieces = _mistral(tok, messages, template)
    return Rendered([i for ids, _ in pieces for i in ids], [trained for ids, trained in pieces for _ in ids])


def resolve_template(tok: Tokenizer, template: str = "auto") -> str:
    """The template's name, `auto` resolved: our renderer that reproduces the shipped template, else jinja; where
    the model ships none, the one whose control tokens the tokenizer has.

    Raises UserError: an unknown name, or one that `tok` cannot write.
    """
    if template == "auto":
        tok.auto_template = tok.auto_template or _auto(tok)
        return tok.auto_template
    if template not in TEMPLATES:
        raise UserError(f"template: unknown name {template!r}; expected one of {', '.join(TEMPLATES)}")
    if missing := _missing(tok, template):
        possible = [name for name in (*OURS, "jinja") if not _missing(tok, name)]
        raise UserError(
            f"template {template} needs {missing}, which this model lacks; "
            f"choose {' or '.join(possible) or 'a model that has it'}",
            path=tok.path,
        )
    return template


def _missing(tok: Tokenizer, template: str) -> str:
    """What `template` needs and `tok` lacks, in words; empty if nothing."""
    missing = [f"the control token {token}" for token in NEEDS.get(template, ()) if token not in tok.control_ids]
    if template.startswith("mistral"):
        missing += [name for name, i in (("a bos token", tok.bos_id), ("an eos token", tok.eos_id)) if i is None]
    if template == "jinja" and tok.chat_template is None:
        missing.append("a chat template (chat_template.jinja, or chat_template in tokenizer_config.json)")
    return " and ".join(missing)


def _auto(tok: Tokenizer) -> str:
    ours = [name for name in OURS if not _missing(tok, name)]
    if "[TOOL_CALLS]" not in tok.control_ids and "mistral-v2" in ours:
        ours.remove("mistral-v3")  # the two differ in tools alone, which came with that token
    if tok.chat_template is not None:
        return next((name for name in ours if _reproduces(tok, name)), "jinja")
    if not ours:
        raise UserError(
            "no chat template is shipped, and the tokenizer has the tokens of none of ours; add a chat_template.jinja",
            path=tok.path,
        )
    return ours[0]


def _reproduces(tok: Tokenizer, template: str) -> bool:
    """Whether our `template` writes what the shipped one does, on every probe that the shipped one accepts (some refuse
    a system message), and it accepts one. Both are cut where answers start; bos may be left to the tokenizer.
    The probes hold what templates are known to drop: white space at an end, and the thoughts of earlier answers.
    """
    system, user, answer, again = (
        {"role": role, "content": text}
        for role, text in (
            ("system", "You are a helpful assistant."),
            ("user", "What is 2 + 2?\n"),
            ("assistant", "<think>Two twos</think>It is 4."),
            ("user", "And 3 + 3?"),
        )
    )
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


def _check(messages: list[dict], template: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise UserError('messages: expected a list of at least one {"role": ..., "content": ...}')
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(f'messages[{i}]: expected {{"role": ..., "content": ...}}, and one or both are missing')
        role, content = message["role"], message["content"]
        if role not in ("system", "user", "assistant"):
            raise UserError(f"messages[{i}]: role {role!r}; expected system, user or assistant")
        if not isinstance(content, str):
            raise UserError(f"messages[{i}]: content is {type(content).__name__}; expected text")
        if re.search("[\ud800-\udfff]", content):
            raise UserError(f"messages[{i}]: content has half of a surrogate pair, no character; mend the text")
        if role == "system" and i > 0:
            raise UserError(f"messages[{i}]: a system message must come first")
    if template.startswith("mistral"):
        first = int(messages[0]["role"] == "system")
        if first == len(messages):
            raise UserError(f"messages[0]: {template} writes a system message into a user message, and none follows")
        for i in range(first, len(messages)):
            if messages[i]["role"] != ("user", "assistant")[(i - first) % 2]:
                raise UserError(
                    f"messages[{i}]: role {messages[i]['role']} here; {template} needs user and assistant "
                    f"in turn, user first: join messages or drop one"
                )


def _in_loss(message: dict) -> bool:
    return message["role"] == "assistant" and message.get("weight") != 0


def _chatml(tok: Tokenizer, messages: list[dict], add_generation_prompt: bool) -> list[tuple[list[int], bool]]:
    start, end = tok.control_ids["<|im_start|>"], tok.control_ids["<|im_end|>"]
    prompt, newline = [start, *tok.encode("assistant\n")], tok.encode("\n")
    pieces = [([tok.bos_id], False)] if tok.adds_bos else []
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "assistant":
            pieces += [(prompt, False), ([*tok.encode(content), end], _in_loss(message)), (newline, False)]
        elif role == "user" or content:  # an empty system prompt is no system turn
            pieces += [([start, *tok.encode(f"{role}\n{content}"), end, *newline], False)]
    return pieces + [(prompt, False)] * add_generation_prompt


def _mistral(tok: Tokenizer, messages: list[dict], template: str) -> list[tuple[list[int], bool]]:
    """The end of a user message is the generation prompt: there is no header to add."""
    v1 = template == "mistral-v1"
    system, turns = ("", messages) if messages[0]["role"] == "user" else (messages[0]["content"], messages[1:])
    carrier = 0 if v1 else (len(turns) - 1) // 2 * 2  # the first or the last user message
    pieces = [([tok.bos_id], False)]
    for i, turn in enumerate(turns):
        content = turn["content"]
        if i % 2:
            pieces.append(([*tok.encode(content if v1 else content.rstrip(" ")), tok.eos_id], _in_loss(turn)))
            continue
        if system and i == carrier:
            content = f"{system}\n\n{content}"
        if v1:
            pieces.append((tok.encode(f"[INST] {content} [/INST]"), False))
        else:
            pieces.append(([tok.control_ids["[INST]"], *tok.encode(content), tok.control_ids["[/INST]"]], False))
    return pieces


def _jinja(tok: Tokenizer, messages: list[dict], add_generation_prompt: bool, masked: bool, most: float) -> Rendered:
    """All the text is encoded at once, as transformers does, while what precedes a border keeps its ids; where a token
    reaches across one (into an answer's leading newline, say) it is cut there, or the prompt would be no prefix."""
    spans, encode = _spans(tok, messages, add_generation_prompt, masked, most)
    encode_grown = _growing(tok, encode)
    ids, trained, done = [], [], ""
    for text, is_trained in spans:
        done += text
        together = encode_grown(done)
        if together[: len(ids)] != ids:
            together = ids + encode(text)
        trained += [is_trained] * (len(together) - len(ids))
        ids = together
    return Rendered(ids, trained)


def _growing(tok: Tokenizer, encode: Callable[[str], list[int]]) -> Callable[[str], list[int]]:
    """`encode` for texts of which each starts with the one before: only what follows a control string near the earlier
    one's end is encoded again. Tokenizers split at control strings first, so that the ids before one do not change.

    The later part is encoded with its control string in front, which may swallow white space behind it, and without
    which some tokenizers would see a text's start. Tokenizers that find control strings otherwise (only between words,
    or in text that they rewrote) have all encoded again."""
    longest = max(map(len, tok.control_ids), default=0)
    head, start = [], 0  # the ids through a control string, and where it starts

    @lru_cache
    def splits(control: str) -> bool:
        whole, front, back = map(tok.encode_template, (f"a{control}a", f"a{control}", f"{control}a"))
        return whole == front + back[1:]

    def encode_grown(text: str) -> list[int]:
        nonlocal head, start
        first = int(bool(head))
        ids = head + encode(text[start:])[first:]
        end, cut = start, None
        for n, piece in enumerate(tok.split_control(text[start:])):
            end += len(piece)
            # A string near the end may turn out to be part of a longer one.
            if n % 2 and end - len(piece) + longest < len(text) and splits(piece):
                cut = end - len(piece), end
        if cut:
            head, start = head + encode(text[start : cut[1]])[first:], cut[0]
        return ids

    return encode_grown


def _spans(
    tok: Tokenizer, messages: list[dict], add_generation_prompt: bool, masked: bool, most: float = inf
) -> tuple[list[tuple[str, bool]], Callable[[str], list[int]]]:
    """The shipped template's text in spans (text, trained), and the function that encodes such text.

    An answer is trained from the end of its generation prompt to the first token that stops a generation.
    """
    in_loss = [_in_loss(message) for message in messages]
    messages, encode = _hide_control(tok, messages)
    stops = [re.escape(token) for token, i in tok.control_ids.items() if i in tok.stop_ids]
    stop = re.compile("|".join(stops) or "(?!)")
    full = _render_text(tok, messages, add_generation_prompt)
    if not masked and most < inf and len(encode(full)) > most:
        return [(full, False)], encode
    spans, done = [], 0
    try:
        for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
            before, through = _render_text(tok, messages[:i], True), _render_text(tok, messages[: i + 1], False)
            ending = stop.search(through, len(before))
            end = ending.end() if ending else len(through)
            if not (through.startswith(before) and full.startswith(through[:end]) and done <= len(before)):
                if not in_loss[i]:
                    continue
                raise UserError(
                    f"the chat template writes messages[{i}] differently when more follows, "
                    f"so its trained tokens cannot be told; choose another template or train_on: all, or "
                    f"give that message the weight 0",
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
    """The messages with a mark for each control string in a content, and the function that encodes what is rendered
    from them: a control string left in that text is the template's own, a typed one becomes ordinary tokens."""
    mark = next(mark for mark in (f"\ue000{n}:" for n in count()) if not any(mark in m["content"] for m in messages))
    typed: list[str] = []

    def hide(match: re.Match) -> str:
        typed.append(match[0])
        return f"{mark}{len(typed) - 1};"

    def encode(text: str) -> list[int]:
        if mark not in text:
            return tok.encode_template(text)
        ids = []
        for n, piece in enumerate(tok.split_control(text)):
            piece = re.sub(mark + r"(\d+);", lambda match: typed[int(match[1])], piece)
            ids += [tok.control_ids[piece]] if n % 2 else tok.encode(piece)
        return ids

    hidden = [{"role": m["role"], "content": tok.hide_control(m["content"], hide)} for m in messages]
    return hidden, encode  # a message's other fields stay behind: nothing looked into them


def _render_text(tok: Tokenizer, messages: list[dict], add_generation_prompt: bool) -> str:
    names = {i: token for token, i in tok.control_ids.items()}
    special = {"bos_token": names.get(tok.bos_id), "eos_token": names.get(tok.eos_id)}
    special = {name: token for name, token in special.items() if token is not None}  # else undefined
    limit = 2**20 + 16 * sum(len(message["content"]) for message in messages)  # a template may loop for long
    variables = {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}
    try:
        return sandbox.render(tok.chat_template, variables | special, limit)
    except sandbox.TemplateFailed as failed:
        raise UserError(
            f"the chat template failed: {failed}; mend the messages, or choose another template", path=tok.path
        ) from None
