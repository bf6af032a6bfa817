"""Conversations written by the template that a model ships, with a loss mask.

A template is a program that returns text, so where answers are in it has to be found. Most contents occur in the text
once. Otherwise the template is rendered once more with marks around every content; where the text is the same but for
the marks, they say where each content is. An answer that this does not find, because the template rewrites it or it is
a tool call, is found by rendering the conversation up to it.
"""

import json
import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, pairwise
from math import inf
from typing import Any

from minorca.data.conversation import is_trained_answer
from minorca.data.rendered import NOTHING_ENDS, Rendered
from minorca.data.shipped_template import answer_header, name_of, write_text
from minorca.data.spans import Span, encode_spans
from minorca.data.tokenizer import Tokenizer
from minorca.errors import UserError

# Of a message, all that a template gets.
FIELDS = ("role", "content", "tool_calls", "tool_call_id", "name")
_MARK = re.compile("\ue000[0-9]+:")
# Finding an answer by rendering takes time in proportion to the conversation, so a conversation may need it so often.
MAX_SEARCHED = 64


@dataclass
class Answer:
    """Where an answer is in a text.

    Attributes:
        start: where its generation prompt ends.
        end: after the token that ends it or, where there is none, after its content.
        token: the control token that ends it; None if there is none.
        is_prompted: whether the generation prompt is what comes before it.
    """

    start: int
    end: int
    token: str | None
    is_prompted: bool


def render_training(tok: Tokenizer, messages: list[dict], tools: list[dict], masked: bool) -> Rendered:
    """A conversation as it is trained. The answer at its end is ended, also where the template has no end of turn.

    Args:
        masked: False if the loss mask will not be used; a template that allows none is then accepted.

    Raises:
        UserError: a template that fails, or under which an answer cannot be found.
    """
    text = _Text(tok, messages, tools)
    full = text.write(text.messages, False)
    answers = text.answers(full, strict=masked)
    trained = [is_trained_answer(message) for message in messages]
    last = answers.get(len(messages) - 1)
    notes = text.notes(full, answers)
    end: list[int] = []
    if last and last.token is None:
        # What the template writes after an answer, such as a newline, would come before the end.
        full = full[: last.end]
        if tok.eos_id is None:
            notes.append(NOTHING_ENDS)
        else:
            end = [tok.eos_id]
            notes.append(f"ended with {name_of(tok, tok.eos_id)}: the template writes no end of turn")
    elif last and last.token and tok.control_ids[last.token] not in tok.stop_ids:
        notes.append(f"with an answer that ends in {last.token}, which does not end a generation")
    rendered = encode_spans(tok, text.encode, _spans(full, answers, trained))
    rendered.ids += end
    rendered.trained += [trained[-1]] * len(end)
    rendered.notes = notes
    return rendered


def render_prompt(
    tok: Tokenizer,
    messages: list[dict],
    tools: list[dict],
    add_generation_prompt: bool,
    continue_final_message: bool,
    max_ids: float,
) -> list[int]:
    """The ids of a conversation that is to be continued. Where its answers start they are as in training.

    Args:
        max_ids: the number of ids above which the caller rejects the conversation. A longer one is not rendered answer
            by answer, so its ids may differ where answers start.
    """
    text = _Text(tok, messages, tools)
    full = text.write(text.messages, add_generation_prompt)
    if add_generation_prompt:
        header = answer_header(tok)
        full += "" if header.is_prompt else header.text
    has_answers = any(message["role"] == "assistant" for message in messages)
    if max_ids < inf or not has_answers:
        ids = text.encode(full)
        if len(ids) > max_ids or not has_answers:
            return ids
    if continue_final_message:
        place = text.contents(full).get(len(messages) - 1)
        if place is None:
            raise UserError(
                f"cannot be continued: the chat template rewrites it ({tok.path}); choose another template",
                field=f"messages[{len(messages) - 1}]",
            )
        full = full[: place[1]]
    return encode_spans(tok, text.encode, _spans(full, text.answers(full, strict=False), [])).ids


def ids_by_span(tok: Tokenizer, messages: list[dict], add_generation_prompt: bool) -> list[int]:
    """The ids of a conversation of which each answer, and what is between them, is encoded on its own."""
    text = _Text(tok, messages, [])
    full = text.write(text.messages, add_generation_prompt)
    return [i for span, _ in _spans(full, text.answers(full, strict=False), []) for i in text.encode(span)]


class _Text:
    """One conversation, as the template gets it.

    Attributes:
        messages: with a placeholder for each control string in them.
        encode: the ids of the template's text. A control string in it is the template's own, a typed one becomes
            ordinary tokens.
    """

    def __init__(self, tok: Tokenizer, messages: list[dict], tools: list[dict]):
        self.tok = tok
        self.original = messages
        given: list[dict] = [{key: m[key] for key in FIELDS if key in m} for m in messages]
        written = json.dumps([given, tools], ensure_ascii=False)
        # What starts a placeholder or a mark: nothing in the conversation does.
        used = set(_MARK.findall(written))
        self.unused = next(mark for mark in (f"\ue000{n}:" for n in count()) if mark not in used)
        self.typed: list[str] = []
        self.messages: list[dict] = self._hidden(given)
        self.tools: list[dict] = self._hidden(tools)
        self.stop = _stop_pattern(tok, frozenset(tok.stop_ids))

    def _hidden(self, value: Any) -> Any:
        """A value with a placeholder for each control string in its texts."""
        if isinstance(value, str):
            return self.tok.replace_control(value, self._placeholder)
        if isinstance(value, list):
            return [self._hidden(item) for item in value]
        if isinstance(value, dict):
            return {key: item if key == "role" else self._hidden(item) for key, item in value.items()}
        return value

    def _placeholder(self, match: re.Match) -> str:
        self.typed.append(match[0])
        return f"{self.unused}{len(self.typed) - 1};"

    def encode(self, text: str) -> list[int]:
        if not self.typed or self.unused not in text:
            return self.tok.encode_template(text)
        placeholder = re.compile(self.unused + r"(\d+);")
        ids = []
        for n, piece in enumerate(self.tok.split_control(text)):
            piece = placeholder.sub(lambda match: self.typed[int(match[1])], piece)
            ids += [self.tok.control_ids[piece]] if n % 2 else self.tok.encode(piece)
        return ids

    def write(self, messages: list[dict], add_generation_prompt: bool) -> str:
        return write_text(self.tok, messages, self.tools, add_generation_prompt)

    def contents(self, full: str) -> dict[int, tuple[int, int]]:
        """(start, end) in `full` of the content of each message, by index, where the template writes it unchanged."""
        if len(self.messages) <= MAX_SEARCHED and (places := self._contents_that_occur_once(full)):
            return places
        # A template that removes white space around contents does so inside of the marks too, but not around them.
        for inside in (False, True):
            try:
                marked = self.write([self._marked(i, inside) for i in range(len(self.messages))], False)
            except UserError:
                continue
            plain, places = _unmarked(marked, self.unused)
            # The generation prompt, or what was cut off to continue a message, is the only difference allowed.
            if full.startswith(plain) or plain.startswith(full):
                return {i: (a, b) for i, (a, b) in places.items() if full[a:b] == self._written(i, inside)}
        return {}

    def _contents_that_occur_once(self, full: str) -> dict[int, tuple[int, int]]:
        """The same without marks, which cost a rendering; empty unless each is there once, and in no other content."""
        header = answer_header(self.tok).text.strip()
        places: dict[int, tuple[int, int]] = {}
        for i, message in enumerate(self.messages):
            content = message["content"]
            if content.strip():
                start = full.find(content)
                if start < 0 or full.find(content, start + 1) >= 0:
                    return {}
                places[i] = (start, start + len(content))
                if message["role"] == "assistant" and not full[:start].rstrip().endswith(header):
                    # It may be a text of the template's own.
                    return {}
        ordered = sorted(places.values())
        overlap = any(end > start for (_, end), (start, _) in pairwise(ordered))
        return {} if overlap else places

    def _written(self, i: int, inside: bool) -> str:
        content = self.messages[i]["content"]
        return content.strip() if inside else content

    def _marked(self, i: int, inside: bool) -> dict:
        """Message i with marks around its content, within the white space at its ends if `inside`."""
        content = self.messages[i]["content"]
        core = self._written(i, inside)
        if not core.strip():
            # Templates ask whether there is a content.
            return self.messages[i]
        start = content.index(core)
        marked = f"{self.unused}<{i};{core}{self.unused}>{i};"
        return self.messages[i] | {"content": content[:start] + marked + content[start + len(core) :]}

    def answers(self, full: str, strict: bool) -> dict[int, Answer]:
        """Where the answers are in `full`, by the index of their message.

        Args:
            strict: raise an error for a trained answer that cannot be found; else leave it out.
        """
        contents = self.contents(full)
        starts = sorted(start for start, _ in contents.values())
        ends = sorted(end for _, end in contents.values())
        found: dict[int, Answer] = {}
        done = 0
        searched = 0
        for i in (i for i, message in enumerate(self.messages) if message["role"] == "assistant"):
            answer = problem = None
            if i in contents and not self.messages[i].get("tool_calls"):
                start, end = contents[i]
                earlier, later = bisect_right(ends, start), bisect_left(starts, end)
                before = ends[earlier - 1] if earlier else 0
                after = starts[later] if later < len(starts) else len(full)
                answer = self._between(full, before, start, end, after, i == len(self.messages) - 1)
            elif searched < MAX_SEARCHED:
                searched += 1
                answer = self._search(full, i, contents)
            else:
                problem = f"more than {MAX_SEARCHED} answers make calls, or are rewritten by the chat template"
            problem = problem or self._problem(i, full, answer, done)
            if problem and strict and is_trained_answer(self.original[i]):
                message = f"{problem}; choose another template or train_on: all, or give that message the weight 0"
                raise UserError(message, path=self.tok.path)
            if answer and answer.start >= done:
                found[i] = answer
                done = answer.end
        return found

    def _problem(self, i: int, full: str, answer: Answer | None, done: int) -> str | None:
        """Why answer i cannot be trained as it was found, after `done`; None if it can."""
        if answer is None or answer.start < done:
            reason = f"the chat template writes messages[{i}] differently when more follows"
            return f"{reason}, so its loss mask cannot be determined"
        written = full[answer.start : answer.end]
        if not all(name in written for name in _called(self.messages[i])):
            return f"the chat template does not write the tool calls of messages[{i}]"
        if self.messages[i]["content"].strip() and not written.removesuffix(answer.token or "").strip():
            return f"the chat template does not write messages[{i}]"
        return None

    def notes(self, full: str, answers: dict[int, Answer]) -> list[str]:
        """What `full`, with these answers in it, has of the messages in another form, or not at all."""
        roles = {m["role"] for m in self.messages if m["role"] != "assistant" and not _is_written(m, full)}
        notes = [f"with a {role} message that the template does not write" for role in sorted(roles)]
        places = {i: full[answer.start : answer.end] for i, answer in answers.items()}
        said = [(message, places.get(i, full)) for i, message in enumerate(self.messages)]
        if any(m["role"] == "assistant" and not _is_written(m, place) for m, place in said):
            notes.append("with an answer that the template does not write as it is")
        if any(is_trained_answer(self.original[i]) and not answer.is_prompted for i, answer in answers.items()):
            notes.append("with an answer after other text than the generation prompt")
        return notes

    def _between(self, full: str, before: int, start: int, end: int, after: int, is_last: bool) -> Answer:
        """The answer whose content is at [start, end), where the contents beside it end at `before` and start at
        `after`.
        """
        header = answer_header(self.tok).text
        written = full[before:start]
        at = written.rfind(header)
        follows = at >= 0 and not written[at + len(header) :].strip()
        if header and follows:
            # White space between the two is what the answer has to start with.
            start = before + at + len(header)
        else:
            # A space before an answer is part of its first token.
            start = before + len(written.rstrip(" "))
        end, token = self._ended(full, end, after, is_last)
        return Answer(start, end, token, follows)

    def _ended(self, full: str, end: int, after: int, is_last: bool) -> tuple[int, str | None]:
        """Where the answer whose content ends at `end` is over, and the control token that ends it."""
        if ending := self.stop.search(full, end, after):
            return ending.end(), ending[0]
        tail, *controls = self.tok.split_control(full[end:after])[:2]
        if is_last and controls and not tail.strip():
            return end + len(tail) + len(controls[0]), controls[0]
        return end, None

    def _search(self, full: str, i: int, contents: dict[int, tuple[int, int]]) -> Answer | None:
        """Finds answer i as what the conversation up to it has more than its prompt; None if `full` lacks it."""
        header = answer_header(self.tok)
        try:
            prompt = self.write(self.messages[:i], True)
            through = self.write(self.messages[: i + 1], False)
        except UserError:
            return None
        if not header.is_prompt and through.startswith(prompt + header.text):
            prompt += header.text
        ending = self.stop.search(through, len(prompt))
        end = ending.end() if ending else len(through)
        if not through.startswith(prompt):
            return None
        start = len(prompt)
        if not full.startswith(through[:end]):
            # What comes before may depend on what follows (tools are written before the last question), but not what is
            # between the messages beside it.
            if i - 1 not in contents:
                return None
            before, (after, _) = contents[i - 1][1], contents.get(i + 1, (len(full), 0))
            start = full.find(through[start:end], before, after)
            if start < 0 or not prompt.endswith(full[before:start]):
                return None
        return Answer(start, start + end - len(prompt), ending[0] if ending else None, True)


def _called(message: dict) -> list[str]:
    """The names of the functions that an answer calls."""
    return [call["function"]["name"] for call in message.get("tool_calls") or ()]


def _is_written(message: dict, text: str) -> bool:
    """Whether a text has a message's content, as it is or in JSON, and the names of the functions that it calls."""
    content = message["content"].strip()
    has_content = content in text or json.dumps(content, ensure_ascii=False)[1:-1] in text
    return has_content and all(name in text for name in _called(message))


@lru_cache(maxsize=8)
def _stop_pattern(tok: Tokenizer, stop_ids: frozenset[int]) -> re.Pattern:
    stops = [re.escape(token) for token, i in tok.control_ids.items() if i in stop_ids]
    return re.compile("|".join(stops) or "(?!)")


def _unmarked(marked: str, unused: str) -> tuple[str, dict[int, tuple[int, int]]]:
    """A marked text without its marks, and where each mark's content is in it; without those written twice."""
    plain, *pieces = re.split(f"{unused}([<>])(\\d+);", marked)
    parts = [plain]
    length = len(plain)
    opened: dict[int, list[int]] = {}
    closed: dict[int, list[int]] = {}
    for kind, index, piece in zip(pieces[::3], map(int, pieces[1::3]), pieces[2::3]):
        (opened if kind == "<" else closed).setdefault(index, []).append(length)
        parts.append(piece)
        length += len(piece)
    once = (i for i, starts in opened.items() if len(starts) == len(closed.get(i, ())) == 1)
    return "".join(parts), {i: (opened[i][0], closed[i][0]) for i in once}


def _spans(full: str, answers: dict[int, Answer], trained: list[bool]) -> list[Span]:
    """The text in spans, of which an answer is trained where `trained` has its index."""
    spans = []
    done = 0
    for i, answer in answers.items():
        spans += [(full[done : answer.start], False), (full[answer.start : answer.end], bool(trained and trained[i]))]
        done = answer.end
    return [*spans, (full[done:], False)]
