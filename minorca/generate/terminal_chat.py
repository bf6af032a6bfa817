"""A conversation in the terminal: lines in, streamed answers out, a few commands."""

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from minorca.data.chat_template import render_chat
from minorca.data.tokenizer import SURROGATE, Tokenizer
from minorca.errors import UserError, one_line
from minorca.generate.text_stream import TextStream

HELP = """\
/system TEXT   sets the system prompt; /system alone shows it, /system - clears it
/reset         forgets what was said, but not the system prompt
/save FILE     writes the conversation to a new FILE.jsonl, which trains as data.format: messages
//...          sends a line that starts with a slash
Ctrl-C stops an answer, Ctrl-D leaves"""
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but newline and tab: a terminal may obey them


def talk(
    answer: Callable[[list[int]], Iterator[int]],
    tok: Tokenizer,
    template: str,
    system: str | None = None,
    max_new_tokens: int | None = None,
) -> None:
    """Answers the lines of standard input until it ends. Answers go to standard output, whatever else there is to say to standard error.

    answer: given a conversation's ids, yields the new ones, a stop id included; closed where the answer is stopped early. What it
        raises ends the turn, which is then not added to the conversation.
    template, system: as of `render_chat`, and its system message.
    max_new_tokens: an answer's most; None leaves it to `answer`.
    """
    if hasattr(sys.stdin, "reconfigure"):  # bytes that are no text end nothing
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    if hasattr(sys.stdout, "reconfigure"):  # nor does text that the terminal has no letters for
        sys.stdout.reconfigure(errors="backslashreplace")
    conversation, typed = Conversation(answer, tok, template, system, max_new_tokens), sys.stdin.isatty()
    if typed:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  `input` then edits lines and remembers them
        _note("/help lists the commands; Ctrl-D leaves")
    while True:
        try:
            conversation.take(input("> " if typed else ""))
        except EOFError:
            return print() if typed else None  # the shell's prompt gets a line of its own
        except KeyboardInterrupt:
            if not typed:
                raise
            _note("\nCtrl-D leaves")


class Conversation:
    """What was said so far, the lines that add to it and the commands that change it."""

    def __init__(self, answer, tok: Tokenizer, template: str, system: str | None, max_new_tokens: int | None):
        self.answer, self.tok, self.template, self.max_new_tokens = answer, tok, template, max_new_tokens
        self.system, self.turns = system, []

    @property
    def messages(self) -> list[dict]:
        return [{"role": "system", "content": self.system}] * bool(self.system) + self.turns

    def take(self, line: str) -> None:
        if SURROGATE.search(line):
            _note("that line is not UTF-8; nothing was sent")
        elif line.startswith("/") and not line.startswith("//"):
            self._obey(*line.split(maxsplit=1))
        elif line.strip():
            self._turn(line[line.startswith("//") :])

    def _turn(self, said: str) -> None:
        """Shows an answer as it comes. What was said before Ctrl-C is the answer."""
        question, text, ids = {"role": "user", "content": said}, TextStream(self.tok), []
        try:
            prompt = render_chat(self.tok, [*self.messages, question], template=self.template)
            with contextlib.closing(self.answer(prompt)) as tokens:
                for token in islice(tokens, self.max_new_tokens):
                    ids.append(token)
                    _show(text.push(token))
            whole, why = (
                ids[-1:] and ids[-1] in self.tok.stop_ids,
                f"after {len(ids)} tokens; --max-new-tokens allows more",
            )
        except KeyboardInterrupt:
            whole, why = False, "short"
        except Exception as error:
            what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            _show("\n" * bool(text.text))  # where nobody reads on, this is BrokenPipeError again, and the end
            return _note(
                f"{one_line(what)}; this turn was not added" + "; /reset forgets the others" * bool(self.turns)
            )
        _show(text.finish() + "\n")
        if not whole:
            _note(f"the answer was cut {why}" if text.text else "nothing was said; this turn was not added")
        if whole or text.text:  # who trains on a saved answer must not learn to end where it was cut
            self.turns += [question, {"role": "assistant", "content": text.text} | ({} if whole else {"weight": 0})]

    def _obey(self, command: str, argument: str = "") -> None:
        argument = argument.strip()
        if command == "/help":
            _note(HELP)
        elif command == "/reset":
            self.turns = []
            _note("what was said is forgotten")
        elif command == "/save":
            self._save(argument)
        elif command == "/system":
            if argument:
                self.system = None if argument == "-" else argument
            _note(f"system prompt: {self.system}" if self.system else "no system prompt")
        else:
            _note(f"{command} is no command; /help lists them, and // sends a line that starts with /")

    def _save(self, name: str) -> None:
        """A new file of one row, in the format `messages` of minorca.data."""
        if not self.turns or not name.endswith(".jsonl"):
            return _note(
                "/save needs the name of a new file that ends in .jsonl" if self.turns else "nothing was said yet"
            )
        try:
            with Path(name).expanduser().open("x", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except (OSError, RuntimeError, ValueError) as error:  # the last two: ~nobody, and a name that is none
            return _note(one_line(f"{name}: cannot be written ({error}); nothing that was there has changed"))
        _note(one_line(f"{name}: {len(self.messages)} messages"))


def _show(text: str, file=None) -> None:
    print(CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text), end="", file=file, flush=True)


def _note(text: str) -> None:
    _show(text + "\n", sys.stderr)
