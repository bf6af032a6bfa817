"""Prompts as text: what `echo` puts before a completion, and where in it each token starts."""

from itertools import groupby

from minorca.data.tokenizer import Tokenizer
from minorca.generate.text_stream import TextStream
from minorca.serve.choice import Echo


def spell(tok: Tokenizer, ids: list[int]) -> list[str]:
    """What each id adds to the text of them all, in which control tokens are their strings."""
    names = {i: name for name, i in tok.control_ids.items()}
    parts: list[str] = []
    has_text = False
    for is_control, run in groupby(ids, key=names.__contains__):
        if is_control:
            parts += [names[i] for i in run]
            continue
        # A space at the start of the whole text is the tokenizer's own.
        stream = TextStream(tok, continues=has_text)
        parts += [stream.push(i) for i in run]
        parts[-1] += stream.finish()
        has_text = True
    return parts


def make_echo(tok: Tokenizer, ids: list[int], text: str | None, has_offsets: bool) -> Echo:
    """What a completion of a prompt starts with: the text as it was sent, or that of its ids.

    Args:
        text: the prompt; None: it was sent as ids.
        has_offsets: whether to find where each id starts. In a text that the tokenizer changes, that is approximate.
    """
    if text is not None and not has_offsets:
        return Echo(text, ids, [])
    parts = spell(tok, ids)
    if text is None:
        text = "".join(parts)
    elif ids[:1] == [tok.bos_id] and not text.startswith(parts[0]):
        # The tokenizer put it there.
        parts[0] = ""
    offsets = []
    offset = 0
    for part in parts if has_offsets else []:
        offsets.append(min(offset, len(text)))
        offset += len(part)
    return Echo(text, ids, offsets)
