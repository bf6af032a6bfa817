"""The text that a model's own template writes."""

from functools import lru_cache
from typing import NamedTuple, cast

from minorca.data import sandbox
from minorca.data.tokenizer import Tokenizer
from minorca.errors import UserError


class Header(NamedTuple):
    """What a template writes before an answer.

    Attributes:
        text: empty where an answer follows the user's message directly, as in Mistral's templates.
        is_prompt: whether the template writes it as its generation prompt; old templates have none.
    """

    text: str
    is_prompt: bool


@lru_cache(maxsize=8)
def answer_header(tok: Tokenizer) -> Header:
    """What the shipped template writes before an answer, found by rendering a short conversation."""
    question = {"role": "user", "content": "question"}
    answer = {"role": "assistant", "content": "answer"}
    try:
        text = write_text(tok, [question], [], False)
        prompt = write_text(tok, [question], [], True)
        if prompt != text:
            return Header(prompt[len(text) :] if prompt.startswith(text) else "", True)
        whole = write_text(tok, [question, answer], [], False)
    except UserError:
        # It takes other conversations only.
        return Header("", True)
    if not whole.startswith(text) or "answer" not in whole[len(text) :]:
        return Header("", True)
    # A space before an answer is part of its first token.
    return Header(whole[len(text) : whole.index("answer", len(text))].rstrip(" "), False)


def write_text(tok: Tokenizer, messages: list[dict], tools: list[dict], add_generation_prompt: bool) -> str:
    """The text that the shipped template writes; where there are tools, that of its template named tool_use, if any.

    Raises:
        UserError: the template failed.
    """
    template = tok.chat_templates.get("tool_use", tok.chat_template) if tools else tok.chat_template
    return write_by(cast(str, template), tok, messages, tools, add_generation_prompt)


def write_by(source: str, tok: Tokenizer, messages: list[dict], tools: list[dict], add_generation_prompt: bool) -> str:
    """The same by another template."""
    variables = {
        "messages": messages,
        "add_generation_prompt": add_generation_prompt,
        "tools": tools or None,
        "documents": None,
    }
    # A template may write in a loop for a long time.
    limit = 2**20 + 16 * sum(len(message["content"]) for message in messages)
    try:
        return sandbox.render(source, variables | special_tokens(tok), limit)
    except sandbox.TemplateFailed as failed:
        raise UserError(
            f"the chat template failed: {failed}; fix the messages, or choose another template", path=tok.path
        ) from None


def writes_tools(tok: Tokenizer) -> bool:
    """Whether the shipped template writes the tools that it is given."""
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    messages = [{"role": "user", "content": "f"}]
    try:
        return write_text(tok, messages, [tool], True) != write_text(tok, messages, [], True)
    except UserError:
        return False


def special_tokens(tok: Tokenizer) -> dict[str, str]:
    """The strings of bos and eos under the names by which templates and tokenizer_config.json know them.

    A token that does not exist is left out, and so stays undefined in a template.
    """
    ids = (("bos_token", tok.bos_id), ("eos_token", tok.eos_id))
    return {key: name for key, i in ids if i is not None and (name := name_of(tok, i))}


def name_of(tok: Tokenizer, token_id: int) -> str | None:
    """The string of a control token."""
    return next((token for token, i in tok.control_ids.items() if i == token_id), None)
