"""Judging answers by a language model behind an OpenAI-compatible endpoint, in FastChat's format.

A judgment is a request of its own, as in FastChat's llm_judge in mode `single`: temperature 0, at most 2048 tokens, and
a rating from 1 to 10 in the answer as [[rating]]. Each is appended to its file when it comes, so that an interrupted
run goes on. The key, if the endpoint wants one, is read from the environment's OPENAI_API_KEY.
"""

import email.utils
import fcntl
import http.client
import json
import logging
import os
import re
import string
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from minorca.data.row_files import open_file
from minorca.errors import UserError, raise_problems
from minorca.files.safe_io import parse_json, quote
from minorca.progress import progress_bar

log = logging.getLogger(__name__)

MAX_TOKENS = 2048
# Requests at once.
PARALLEL = 4
# Seconds before each attempt after the first, unless the endpoint's Retry-After asks for more.
DELAYS = (1, 2, 4, 8, 16, 32)
TIMEOUT = 300
MAX_REPLY_BYTES = 10**7
# What another attempt may mend, beside errors of the server and of the network.
TEMPORARY = (408, 409, 425, 429)
# What every other request would be answered too.
REFUSED = (301, 302, 303, 307, 308, 401, 403, 404)
NO_RATING = -1
RATING = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))
# The fields that the templates of FastChat's prompts have, by the prompts' names.
FIELDS = {
    "single-v1": {"question", "answer"},
    "single-math-v1": {"question", "answer", "ref_answer_1"},
    "single-v1-multi-turn": {"question_1", "question_2", "answer_1", "answer_2"},
    "single-math-v1-multi-turn": {
        "question_1",
        "question_2",
        "answer_1",
        "answer_2",
        "ref_answer_1",
        "ref_answer_2",
    },
}


@dataclass(frozen=True)
class Match:
    """An answer to judge.

    Attributes:
        prompt: the name of the judge's prompt.
        fields: what its template takes.
    """

    question_id: int
    turn: int
    prompt: str
    fields: dict[str, str]


class Failure(Exception):
    """Why a judgment did not come.

    Args:
        wait: seconds that the endpoint asks for before another attempt, None where that would not help.
        refused: whether it refuses all requests.
    """

    def __init__(self, message: str, wait: float | None = None, refused: bool = False):
        super().__init__(message)
        self.wait = wait
        self.refused = refused


@dataclass(frozen=True)
class Judge:
    """Args:
    url: the endpoint's base, such as https://api.openai.com/v1.
    model: what the endpoint calls the judge.
    prompts: FastChat's judge prompts by name.
    delays: seconds before each further attempt.
    """

    url: str
    model: str
    prompts: dict[str, dict[str, str]]
    delays: Sequence[float] = DELAYS

    def __post_init__(self):
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"is {self.url}; expected a URL such as https://api.openai.com/v1", field="--judge")
        # which the message must not quote
        if not _key().isascii() or not _key().isprintable():
            raise UserError("has a character that a key cannot have", field="the environment's OPENAI_API_KEY")

    def judge_all(self, matches: Sequence[Match], model_id: str, file: Path) -> list[dict[str, Any]]:
        """The judgments of all matches, those that `file` already has among them.

        Raises:
            UserError: some did not come after all attempts (how many, and why), or the endpoint refuses requests; those
                that came are in `file`, and another call asks for the rest. `file` has judgments of other answers.
        """
        judged = self._read(matches, model_id, file)
        missing = [match for match in matches if (match.question_id, match.turn) not in judged]
        failures: list[tuple[Match, Failure]] = []
        # since the last judgment that came
        in_a_row = 0
        stop = threading.Event()
        lock = threading.Lock()
        progress = progress_bar("judging", len(matches), "answers", len(judged))

        def judge_one(match: Match) -> None:
            nonlocal in_a_row
            if stop.is_set():
                return
            try:
                judgment = self._judge(match, model_id, stop)
            except Failure as failure:
                with lock:
                    failures.append((match, failure))
                    # one that another attempt could have mended was tried for a minute
                    in_a_row += failure.wait is not None
                    if failure.refused or in_a_row == PARALLEL:
                        stop.set()
                return
            with lock:
                in_a_row = 0
                append_line(file, judgment)
                judged[match.question_id, match.turn] = judgment
                progress.update()

        pool = ThreadPoolExecutor(PARALLEL)
        try:
            for future in [pool.submit(judge_one, match) for match in missing]:
                future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
            progress.close()
        if failures:
            # whatever the order in which they failed: a refusal, or the first of the questions
            match, failure = min(failures, key=lambda pair: (not pair[1].refused, matches.index(pair[0])))
            kept = "the others are in it, and " if judged else ""
            raise UserError(
                f"{len(matches) - len(judged)} of {len(matches)} judgments did not come; question {match.question_id}, "
                f"turn {match.turn}: {failure}; {kept}the same command goes on with the rest",
                path=file,
            )
        return [judged[match.question_id, match.turn] for match in matches]

    def _read(self, matches: Sequence[Match], model_id: str, file: Path) -> dict[tuple[int, int], dict[str, Any]]:
        """The judgments of a file by question and turn."""
        wanted = {(match.question_id, match.turn): match for match in matches}
        judged = {}
        for number, line in read_lines(file):
            key = (line.get("question_id"), line.get("turn"))
            # another's line may have what cannot be a key
            match = next((wanted[each] for each in wanted if each == key), None)
            if match and line.get("model") == model_id and line.get("judge") == [self.model, match.prompt]:
                prompts = self.prompts[match.prompt]["system_prompt"], self._user_prompt(match)
                # FastChat's own lines have no system prompt
                if (line.get("system_prompt", prompts[0]), line.get("user_prompt")) != prompts:
                    message = f"is of another answer of {model_id}, or prompt; move the file away to judge again"
                    raise UserError(message, path=file, where=f"line {number}", field="user_prompt")
                if not isinstance(line.get("score"), int | float):
                    message = f"is {quote(line.get('score'))}; expected a rating"
                    raise UserError(message, path=file, where=f"line {number}", field="score")
                judged[match.question_id, match.turn] = line
        return judged

    def _user_prompt(self, match: Match) -> str:
        return self.prompts[match.prompt]["prompt_template"].format(**match.fields)

    def _judge(self, match: Match, model_id: str, stop: threading.Event) -> dict[str, Any]:
        system_prompt, user_prompt = self.prompts[match.prompt]["system_prompt"], self._user_prompt(match)
        messages = [{"role": "system", "content": system_prompt}, {"role": "user", "content": user_prompt}]
        judgment = self._ask(messages, stop)
        return {
            "question_id": match.question_id,
            "model": model_id,
            "judge": [self.model, match.prompt],
            "system_prompt": system_prompt,
            "user_prompt": user_prompt,
            "judgment": judgment,
            "score": rating_of(judgment),
            "turn": match.turn,
            "tstamp": time.time(),
        }

    def _ask(self, messages: list[dict[str, str]], stop: threading.Event) -> str:
        """Raises Failure after the last attempt."""
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS, "n": 1}
        url = f"{self.url.rstrip('/')}/chat/completions"
        for delay in self.delays:
            try:
                return _post(url, body)
            except Failure as failure:
                if failure.wait is None:
                    raise
                seconds = max(delay, failure.wait)
                log.warning("%s; the next attempt is in %g s", failure, seconds)
                if stop.wait(seconds):
                    raise
        return _post(url, body)


def rating_of(judgment: str) -> float:
    """The rating in a judgment as FastChat reads it, -1 where there is none."""
    for pattern in RATING:
        if match := pattern.search(judgment):
            return float(match[1])
    return NO_RATING


# --------------------------------------------------------------------------------------------------------- the endpoint


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirection would send the key to another host."""

    def redirect_request(self, *_):
        return None


@cache
def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_NoRedirect)


def _key() -> str:
    return os.environ.get("OPENAI_API_KEY", "").strip()


def _post(url: str, body: dict) -> str:
    """The content of the answer's first choice. Raises Failure where there is none."""
    headers = {"Content-Type": "application/json"}
    if key := _key():
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with _opener().open(request, timeout=TIMEOUT) as response:
            reply = parse_json(response.read(MAX_REPLY_BYTES))
        content = reply["choices"][0]["message"]["content"]
        if not isinstance(content, str):
            raise TypeError(f"content is {quote(content)}")
        return content
    except urllib.error.HTTPError as error:
        temporary = error.code >= 500 or error.code in TEMPORARY
        message = f"{url} answered {error.code} {error.reason}{_error_message(error)}"
        raise Failure(message, _retry_after(error) if temporary else None, error.code in REFUSED) from None
    except (OSError, http.client.HTTPException) as error:
        raise Failure(f"{url} cannot be reached ({error})", 0) from None
    except (ValueError, RecursionError, LookupError, TypeError) as error:
        raise Failure(f"{url} did not answer as OpenAI's chat completions do ({error})", 0) from None


def _error_message(error: urllib.error.HTTPError) -> str:
    try:
        return f": {parse_json(error.read(10**5))['error']['message']}"
    # another format of errors, or none
    except (OSError, ValueError, RecursionError, LookupError, TypeError, http.client.HTTPException):
        return ""


def _retry_after(error: urllib.error.HTTPError) -> float:
    """Seconds, of a number of them or a date (RFC 9110, section 10.2.3)."""
    value = error.headers.get("Retry-After", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0
    return max(0, min(seconds, 600))


# ---------------------------------------------------------------------------------------------------------------- files


def read_prompts(file: Path) -> dict[str, dict[str, str]]:
    """FastChat's judge_prompts.jsonl: the four prompts that rate single answers, by name.

    Raises:
        UserError: each that is missing or has another schema, with its line and field.
    """
    lines = {str(line.get("name")): (number, line) for number, line in read_records(file)}
    raise_problems(_prompt_problems(file, lines))
    return {name: lines[name][1] for name in FIELDS}


def _prompt_problems(file: Path, lines: dict) -> Iterator[UserError]:
    for name, fields in FIELDS.items():
        if name not in lines:
            yield UserError(f"has no prompt of the name {name}; expected FastChat's judge_prompts.jsonl", path=file)
            continue
        number, line = lines[name]
        where = f"line {number}"
        for field, expected in {"type": "single", "output_format": "[[rating]]"}.items():
            if line.get(field) != expected:
                yield UserError(
                    f"is {quote(line.get(field))}; expected {expected}", path=file, where=where, field=field
                )
        for field in ("system_prompt", "prompt_template"):
            if not isinstance(line.get(field), str):
                yield UserError(f"is {quote(line.get(field))}; expected text", path=file, where=where, field=field)
        template = line.get("prompt_template")
        if isinstance(template, str) and (found := _fields_of(template)) != fields:
            message = f"has the fields {quote(sorted(found))}; expected {sorted(fields)}"
            yield UserError(message, path=file, where=where, field="prompt_template")


def _fields_of(template: str) -> set[str]:
    try:
        return {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
    except ValueError as error:
        return {f"({error})"}


def read_records(file: Path) -> Iterator[tuple[int, dict]]:
    """The objects of a file of JSON lines, with their line numbers.

    Raises:
        UserError: the file or a line cannot be read.
    """
    for number, record in open_file(file).records():
        if isinstance(record, UserError):
            raise record
        yield number, record


def read_lines(file: Path) -> Iterator[tuple[int, dict]]:
    """As `read_records`, of a file that `append_line` writes; nothing where there is none.

    The last line is dropped where a run was killed within it.
    """
    try:
        with file.open("r+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            complete = stream.read().rfind(b"\n") + 1
            stream.truncate(complete)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"cannot be read and written ({error})", path=file) from None
    if complete:
        yield from read_records(file)


def append_line(file: Path, value: dict) -> None:
    """Adds an object to a file of JSON lines.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # what is no Unicode becomes one of JSON's escapes
        with file.open("a", encoding="utf-8", errors="backslashreplace") as stream:
            # runs of other models may have the same judge
            fcntl.flock(stream, fcntl.LOCK_EX)
            stream.write(json.dumps(value, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"cannot be written ({error})", path=file) from None
