"""The chat in the terminal, with a scripted model: what the model is given, what is shown, what is kept."""

import fcntl
import io
import itertools
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
import unicodedata
from collections import Counter
from functools import partial

import pytest

from minorca import UserError, load_tokenizer, render_chat
from minorca.config import Source
from minorca.data.chat_template import render
from minorca.data.conversation import Conversation
from minorca.data.sources import Row, open_source, read_rows
from minorca.generate.terminal_chat import run_chat
from tests.data.test_tokenizer import V3, sentencepiece_directory
from tests.helpers import ROOT, save_tokenizer


@pytest.fixture
def tok(tmp_path):
    (tmp_path / "model").mkdir()
    save_tokenizer(tmp_path / "model")
    return load_tokenizer(tmp_path / "model")


@pytest.fixture
def v3(tmp_path):
    return load_tokenizer(sentencepiece_directory(tmp_path / "v3", V3))


class Script:
    """A model with fixed answers, each ended by a stop id. The pieces of an answer are text, ids, or exceptions."""

    def __init__(self, tok, *answers):
        self.tok = tok
        self.answers = iter(answers)
        self.prompts = []
        self.closed = 0

    def __call__(self, ids):
        self.prompts.append(ids)
        try:
            for piece in next(self.answers):
                if isinstance(piece, BaseException):
                    raise piece
                yield from piece if isinstance(piece, list) else self.tok.encode(piece)
            yield next(iter(self.tok.stop_ids))
        finally:
            self.closed += 1


@pytest.fixture
def converse(monkeypatch, capsys):
    """converse(script, lines, template, ...) -> (standard output, standard error); the lines come through a pipe."""

    def run(script, lines: str | bytes, template: str = "auto", **options):
        data = lines if isinstance(lines, bytes) else lines.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        run_chat(script, script.tok, template, **options)
        return capsys.readouterr()

    return run


def turns(*contents: str, system: str = "") -> list[dict]:
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
    return [{"role": "system", "content": system}] * bool(system) + messages


def saved(path) -> list[dict]:
    [row] = read_rows(open_source(Source(str(path), "messages"), None), None, Counter())
    assert isinstance(row, Row) and isinstance(row.content, Conversation)
    return row.content.messages


def test_each_turn_has_all_before_it(tok, converse):
    script = Script(tok, ["Hello"], ["Still here"], [""], ["Bye"])
    out, err = converse(script, "Hi\n\n   \nAnd now?\r\n\nx\ny", system="Be brief.")
    assert (out, err) == ("Hello\nStill here\n\nBye\n", "")
    asked = ["Hi", "Hello", "And now?", "Still here", "x", "", "y"]
    assert script.prompts == [render_chat(tok, turns(*asked[: 2 * n + 1], system="Be brief.")) for n in range(4)]


def test_system_prompts_where_history_is_not_a_prefix(v3, converse):
    """mistral-v3 writes the system prompt before the last user message: every turn is rendered anew."""
    script = Script(v3, ["uno"], ["dos"], ["tres"], ["quatro"])
    out, err = converse(
        script, "one\n/system\n/system Speak  Spanish. \ntwo\nthree\n/system\n/system -\nfour\n", "mistral-v3"
    )
    assert out == "uno\ndos\ntres\nquatro\n"
    assert err.splitlines() == ["no system prompt"] + ["system prompt: Speak  Spanish."] * 2 + ["no system prompt"]
    said = ["one", "uno", "two", "dos", "three", "tres", "four"]
    systems = ["", "Speak  Spanish.", "Speak  Spanish.", ""]
    expected = [turns(*said[: 2 * n + 1], system=system) for n, system in enumerate(systems)]
    assert script.prompts == [render_chat(v3, messages, template="mistral-v3") for messages in expected]
    assert script.prompts[2][: len(script.prompts[1])] != script.prompts[1]


def test_reset_keeps_the_system_prompt(tok, converse):
    script = Script(tok, ["1"], ["2"])
    _, err = converse(script, "one\n/reset\ntwo\n", system="Count.")
    assert script.prompts[1] == render_chat(tok, turns("two", system="Count.")) and "was reset" in err


def test_commands_are_not_sent(tok, converse):
    script = Script(tok, ["1"], ["2"])
    out, err = converse(script, "/help\n/quit now\n/\n//etc is a directory\n/Reset\x1b[2J\n // two\n")
    assert out == "1\n2\n"
    assert script.prompts[1] == render_chat(tok, turns("/etc is a directory", "1", " // two"))
    for name in (
        "/system",
        "/reset",
        "/save",
        "Ctrl-C",
        "Ctrl-D",
        "unknown command /quit;",
        "unknown command /;",
        "unknown command /Reset\\x1b[2J;",
    ):
        assert name in err


def test_a_saved_conversation_can_be_trained_on(tok, converse, tmp_path):
    """As it was said, with the system prompt; an answer that was cut is there and not trained."""
    first = tmp_path / "first one.jsonl"
    second = tmp_path / "second.jsonl"
    script = Script(tok, ["é\n\u2028\x1b[1m"], ["begun", KeyboardInterrupt()], ["whole"])
    _, err = converse(script, f"/save {first}\na\nb\n/save {first}\nc\n/save {first}\n/save {second}\n", system="S")
    assert saved(first) == turns("a", "é\n\u2028\x1b[1m", "b", system="S") + [
        {"role": "assistant", "content": "begun", "weight": 0}
    ]
    assert saved(second) == saved(first) + turns("c", "whole")
    assert [
        "there is nothing to save yet",
        "the answer was interrupted",
        f"{first}: 5 messages",
        f"{second}: 7 messages",
    ] == [line for line in err.splitlines() if "File exists" not in line] and err.count("File exists") == 1
    rendered = render(tok, saved(second))
    assert tok.decode([i for i, trained in zip(rendered.ids, rendered.trained) if trained]) == "é\n\u2028\x1b[1mwhole"
    assert script.prompts[2] == render_chat(tok, saved(first) + turns("c"))


NAMES = ["", "chat", "chat.json", "absent/chat.jsonl", "~nobody-at-all/chat.jsonl", "a\0b.jsonl", "x" * 300 + ".jsonl"]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_invalid_file_names(name, tok, converse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = list(tmp_path.rglob("*"))
    out, err = converse(Script(tok, ["1"], ["2"]), f"one\n/save {name}\ntwo\n")
    assert out == "1\n2\n" and len(err.splitlines()) == 1 and ("expects the name" in err or "cannot be written" in err)
    assert list(tmp_path.rglob("*")) == before


def test_a_turn_that_fails_is_not_added(tok, converse):
    """The engine's errors at the start or in the middle of an answer, and all other exceptions."""
    full = UserError("600 prompt tokens and --max-new-tokens 9 are over the model's 512 positions")
    script = Script(tok, [full], ["1"], ["2", full], ["3", RuntimeError("out of\nmemory")], ["4"])
    out, err = converse(script, "zero\none\ntwo\nthree\nfour\n")
    assert out == "1\n2\n3\n4\n" and script.closed == 5
    assert err.splitlines() == [
        f"{full}; this turn was not added",
        f"{full}; this turn was not added; /reset starts a new conversation",
        "RuntimeError: out of memory; this turn was not added; /reset starts a new conversation",
    ]
    assert script.prompts[-1] == render_chat(tok, turns("one", "1", "four"))


def test_what_the_template_cannot_render(tok, converse):
    out, err = converse(Script(tok), "one\ntwo\n", "mistral-v3")
    assert out == "" and err.count("needs the control token [INST]") == 2


def test_ctrl_c_stops_an_answer(tok, converse):
    """Text that was shown is kept, an incomplete character as U+FFFD; a turn without text is dropped."""
    script = Script(tok, ["Well", tok.encode("é")[:1], KeyboardInterrupt()], [KeyboardInterrupt()], ["ok"])
    out, err = converse(script, "one\ntwo\nthree\n")
    assert out == "Well\ufffd\n\nok\n" and script.closed == 3
    assert err.splitlines() == ["the answer was interrupted", "the answer is empty; this turn was not added"]
    assert script.prompts[2] == render_chat(tok, turns("one", "Well\ufffd", "three"))


def test_ctrl_c_anywhere_closes_the_answer(tok, converse, monkeypatch):
    """It may come while text is being printed, not only while the model computes."""
    script = Script(tok, itertools.repeat("x"), ["2"])
    plain = print
    raised = iter([KeyboardInterrupt()])

    def show(*args, **options):
        plain(*args, **options)
        for error in raised:
            raise error

    monkeypatch.setattr("builtins.print", show)
    out, _ = converse(script, "one\ntwo\n")
    assert out == "x\n2\n" and script.closed == 2 and script.prompts[1] == render_chat(tok, turns("one", "x", "two"))


def test_an_answer_has_an_end(tok, converse, tmp_path):
    script = Script(tok, itertools.repeat("ab"), ["c"])
    out, err = converse(script, f"one\ntwo\n/save {tmp_path}/x.jsonl\n", max_new_tokens=5)
    assert out == "ababa\nc\n" and script.closed == 2 and "cut off after 5 tokens; --max-new-tokens" in err
    assert [message.get("weight") for message in saved(tmp_path / "x.jsonl")] == [None, 0, None, None]


def test_whole_characters_are_shown_as_they_come(tok, converse, monkeypatch, capsys):
    """Each as soon as its last byte has come; the tokens are single bytes."""
    seen = []
    shown = ""

    def answer(ids):
        nonlocal shown
        for token in tok.encode("aé日😀"):
            yield token
            shown += capsys.readouterr().out
            seen.append(shown)

    answer.tok = tok
    converse(answer, "one\n")
    assert seen == ["a", "a", "aé", "aé", "aé", "aé日", "aé日", "aé日", "aé日", "aé日😀"]


def test_control_characters_do_not_reach_the_terminal(tok, converse, tmp_path):
    """They are escaped, in notes too; all other text is unchanged, and so is what is kept."""
    said = "\x1b[2J\x07\x7f\x9b1m\r\n\tfine: é 日\u3000本 👩‍🚀 \u00a0"
    controls = "".join(chr(c) for c in range(0xA0) if unicodedata.category(chr(c)) == "Cc")
    script = Script(tok, [said], [controls])
    out, err = converse(script, f"one\ntwo\n/system \x1b]0;title\x07\n/save {tmp_path}/x.jsonl\n")
    assert out.startswith("\\x1b[2J\\x07\\x7f\\x9b1m\\r\n\tfine: é 日\u3000本 👩‍🚀 \u00a0\n\\x00\\x01")
    assert set(out) & set(controls) == {"\n", "\t"}
    assert "system prompt: \\x1b]0;title\\x07\n" in err
    assert (
        script.prompts[1] == render_chat(tok, turns("one", said, "two"))
        and saved(tmp_path / "x.jsonl")[2]["content"] == said
    )


def test_lines_that_are_not_utf8_are_refused(tok, converse):
    script = Script(tok, ["1"])
    out, err = converse(script, b"caf\xe9\n/save \xff.jsonl\nna\xc3\xafve\n")
    assert out == "1\n" and err.count("not valid UTF-8 and was not sent") == 2
    assert script.prompts == [render_chat(tok, turns("naïve"))]


def test_a_terminal_that_cannot_encode_an_answer(tok, converse, monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    converse(Script(tok, ["né"]), "one\n")
    assert narrow.buffer.getvalue() == b"n\\xe9\n"


def test_a_closed_standard_output_ends_the_chat(tok, converse, monkeypatch):
    """By BrokenPipeError, which cli.run handles."""
    reader, writer = os.pipe()
    os.close(reader)
    with io.TextIOWrapper(open(writer, "wb", buffering=0), write_through=True) as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        with pytest.raises(BrokenPipeError):
            converse(Script(tok, ["1"], ["2"]), "one\ntwo\n")


PROGRAM = """
import itertools, sys, time
from minorca import cli, load_tokenizer
from minorca.generate.terminal_chat import run_chat

tok = load_tokenizer(sys.argv[1])

def counting():
    for n in itertools.count():
        yield from tok.encode(f"{n} ")
        time.sleep(0.01)

answers = iter([counting(), iter(tok.encode("done") + [tok.eos_id])])
cli.run(lambda argv: run_chat(lambda ids: (yield from next(answers)), tok, "auto", max_new_tokens=10**6))
"""


def start(tok, prepare=lambda: None, **streams) -> subprocess.Popen:
    def prepared():
        # It is ignored where the tests run in the background.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        prepare()

    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "TERM": "dumb"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tok.path)], env=environment, preexec_fn=prepared, **streams
    )


def read_until(descriptor: int, text: str, again=lambda: None) -> str:
    found = ""
    deadline = time.monotonic() + 60
    while text not in found:
        assert time.monotonic() < deadline, found
        if select.select([descriptor], [], [], 1)[0]:
            found += os.read(descriptor, 4096).decode()
        else:
            again()
    return found


def test_sigint_in_a_pipe(tok, tmp_path):
    """It stops the running answer, or the process if there is none."""
    process = start(tok, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin and process.stdout and process.stderr
    process.stdin.write(f"count\ngo on\n/save {tmp_path}/x.jsonl\n".encode())
    process.stdin.flush()
    shown = read_until(process.stdout.fileno(), "5 6 ")
    process.send_signal(signal.SIGINT)
    shown += read_until(process.stdout.fileno(), "done\n")
    assert shown.startswith("0 1 2 3 4 5 6 ") and shown.endswith("\ndone\n")
    read_until(process.stderr.fileno(), "4 messages\n")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, b"")
    assert saved(tmp_path / "x.jsonl")[1] == {"role": "assistant", "content": shown.splitlines()[0], "weight": 0}


def test_keys_at_a_terminal(tok):
    """Ctrl-C stops an answer, and without one prints how to exit; Ctrl-D exits."""
    terminal, theirs = pty.openpty()
    process = start(
        tok,
        lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        shown = read_until(terminal, "> ")
        for keys, reply in (
            (b"half a line\x03", "\nCtrl-D exits\r\n> "),
            (b"count\r", "5 6 "),
            (b"\x03", "\nthe answer was interrupted\r\n> "),
            (b"go on\r", "done\r\n> "),
        ):
            os.write(terminal, keys)
            # Python sees a Ctrl-C that comes while it prepares to read at the next key only.
            shown += read_until(terminal, reply, partial(os.write, terminal, keys[-1:]))
        os.write(terminal, b"\x04")
        read_until(terminal, "\r\n")
        assert process.wait(30) == 0 and "Traceback" not in shown and "/help lists the commands" in shown
    finally:
        process.kill()
        os.close(terminal)
