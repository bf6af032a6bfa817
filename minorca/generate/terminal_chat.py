"""A chat in the terminal: lines of standard input are messages or commands, answers are streamed."""

import contextlib
import json
import re
import sys
from collections.abc import Callable, Generator
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import TextIO

from minorca.data.chat_template import render_chat
from minorca.data.tokenizer import SURROGATE, Tokenizer
from minorca.errors import UserError, one_line
from minorca.generate.text_stream import TextStream

HELP = """\
/system TEXT   sets the system prompt; /system alone shows it, /system - removes it
/reset         starts a new conversation with the same system prompt
/save FILE     saves the conversation to a new FILE.jsonl, which can be trained on as data.format: messages
//...          sends a line that starts with a slash
Ctrl-C stops an answer, Ctrl-D exits"""
# All but newline and tab: a terminal may interpret them.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def run_chat(
    answer: Callable[[list[int]], Generator[int, None, None]],
    tok: Tokenizer,
    template: str,
    system: str | None = None,
    max_new_tokens: int | None = None,
) -> None:
    """Answers the lines of standard input until it ends.

    Answers go to standard output, everything else to standard error.

    Args:
        answer: yields the new ids after a conversation's ids, including the stop id; closed when the answer is stopped
            early. An exception that it raises ends the turn, which is not added to the conversation.
        template: as in `render_chat`.
        system: the system prompt.
        max_new_tokens: the maximum length of an answer; None leaves it to `answer`.
    """
    if isinstance(sys.stdin, TextIOWrapper):
        # A line that is not UTF-8 is reported and does not end the chat.
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    if isinstance(sys.stdout, TextIOWrapper):
        # Characters that the terminal cannot encode are escaped.
        sys.stdout.reconfigure(errors="backslashreplace")
    conversation = Conversation(answer, tok, template, system, max_new_tokens)
    interactive = sys.stdin.isatty()
    if interactive:
        # With readline, `input` supports editing and history.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
        _note("/help lists the commands; Ctrl-D exits")
    while True:
        try:
            conversation.handle_line(input("> " if interactive else ""))
        except EOFError:
            break
        except KeyboardInterrupt:
            if not interactive:
                raise
            _note("\nCtrl-D exits")
    if interactive:
        # The shell's prompt starts on a line of its own.
        print()


class Conversation:
    """The messages so far; lines add to them, commands change them. Arguments are those of `run_chat`."""

    def __init__(
        self,
        answer: Callable[[list[int]], Generator[int, None, None]],
        tok: Tokenizer,
        template: str,
        system: str | None,
        max_new_tokens: int | None,
    ):
        self.answer = answer
        self.tok = tok
        self.template = template
        self.max_new_tokens = max_new_tokens
        self.system = system
        self.turns: list[dict] = []

    @property
    def messages(self) -> list[dict]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.turns

    def handle_line(self, line: str) -> None:
        """Runs a command, or sends a message; empty lines are ignored."""
        if SURROGATE.search(line):
            _note("this line is not valid UTF-8 and was not sent")
        elif line.startswith("//"):
            self._send(line[1:])
        elif line.startswith("/"):
            self._run_command(*line.split(maxsplit=1))
        elif line.strip():
            self._send(line)

    def _send(self, content: str) -> None:
        """Streams the answer to a message. After Ctrl-C, the text that was shown is the answer."""
        question = {"role": "user", "content": content}
        stream = TextStream(self.tok)
        ids: list[int] = []
        complete = False
        interrupted = False
        try:
            prompt = render_chat(self.tok, [*self.messages, question], template=self.template)
            with contextlib.closing(self.answer(prompt)) as tokens:
                for token in islice(tokens, self.max_new_tokens):
                    ids.append(token)
                    _show(stream.push(token))
            complete = bool(ids) and ids[-1] in self.tok.stop_ids
        except KeyboardInterrupt:
            interrupted = True
        except Exception as error:
            self._report_failure(error, stream)
            return
        _show(stream.finish() + "\n")
        if not complete and not stream.text:
            _note("the answer is empty; this turn was not added")
            return
        answer: dict[str, str | int] = {"role": "assistant", "content": stream.text}
        if not complete:
            # A model trained on the saved conversation must not learn to end here.
            answer["weight"] = 0
            if interrupted:
                _note("the answer was interrupted")
            else:
                _note(f"the answer was cut off after {len(ids)} tokens; --max-new-tokens sets the limit")
        self.turns += [question, answer]

    def _report_failure(self, error: Exception, stream: TextStream) -> None:
        if stream.text:
            # If nobody reads standard output, this raises BrokenPipeError again, which ends the chat.
            _show("\n")
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        hint = "; /reset starts a new conversation" if self.turns else ""
        _note(f"{one_line(reason)}; this turn was not added{hint}")

    def _run_command(self, command: str, argument: str = "") -> None:
        argument = argument.strip()
        if command == "/help":
            _note(HELP)
        elif command == "/reset":
            self.turns = []
            _note("the conversation was reset")
        elif command == "/save":
            self._save(argument)
        elif command == "/system":
            if argument:
                self.system = None if argument == "-" else argument
            _note(f"system prompt: {self.system}" if self.system else "no system prompt")
        else:
            _note(f"unknown command {command}; /help lists the commands, and // sends a line that starts with /")

    def _save(self, name: str) -> None:
        """Writes a new JSONL file of one row, which data.format: messages reads."""
        if not self.turns:
            _note("there is nothing to save yet")
            return
        if not name.endswith(".jsonl"):
            _note("/save expects the name of a new file that ends in .jsonl")
            return
        try:
            with Path(name).expanduser().open("x", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        # RuntimeError: the home of an unknown user; ValueError: a null character in the name.
        except (OSError, RuntimeError, ValueError) as error:
            _note(one_line(f"{name}: cannot be written ({error}); existing files are unchanged"))
        else:
            _note(one_line(f"{name}: {len(self.messages)} messages"))


def _show(text: str, file: TextIO | None = None) -> None:
    print(CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text), end="", file=file, flush=True)


def _note(text: str) -> None:
    _show(text + "\n", sys.stderr)
