"""Renders chat templates, which are untrusted programs, in Jinja's sandbox and that in a process of its own, and tries
tokenizers there (tokenizer_probe.py) before they are read here.

Jinja's sandbox keeps a template from the interpreter, but not from all memory and time ('a' * 10**10, nested loops,
strings that double), often within one call that nothing in the process can interrupt. The kernel can: it ends the
process at its limits. The process can open no file and start no other process, so escaping from Jinja's sandbox gains
little. It does not import minorca: these two files are all it runs, and it starts in a tenth of a second.
"""

import contextlib
import hashlib
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from math import inf

import jinja2

# Otherwise imported at a template's first error, when no file can be opened any more.
import jinja2.debug
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

# The limits of one request in processor time, and of the process in bytes. A rendering takes 0.1 ms and 30 MB, trying a
# tokenizer.json of 33 million bytes, the largest in use, a second and 400 MB.
MAX_SECONDS = 5
MAX_MEMORY = 2**30
# What a tokenizer may take more, by its size.
BYTES_PER_SECOND = 2 * 10**6
PROBE = "tokenizer_probe.py"
# What the process needs of our environment to find jinja2 and the time; keys and tokens stay here.
ENVIRONMENT = ("HOME", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH", "PYTHONUSERBASE", "TZ", "TZDIR")
# Exit statuses that are not the template's fault: sent by a user, or by the system when it runs out of memory.
EXTERNAL_SIGNALS = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP, -signal.SIGUSR1, -signal.SIGUSR2)


class TemplateFailed(Exception):
    """What a template or tokenizer raised, or which limit it exceeded."""


class NoReply(TemplateFailed):
    """A limit was exceeded, or the process could not answer for another reason."""


class _Worker:
    """The sandbox process: started when first needed, one request at a time, from any thread."""

    def __init__(self):
        self.process: subprocess.Popen | None = None
        self.lock = threading.Lock()
        # By template: the size of variables above which it is not tried again, and the reason.
        self.exhausting: dict[str, tuple[float, str]] = {}

    def ask(self, source: str, request: bytes, size: int, seconds: int = MAX_SECONDS) -> bytes:
        """The process's reply to a request about template `source`, whose variables have `size` bytes.

        Raises:
            NoReply: the template exceeded a limit, now or with such variables before; no process could be
                started, or it was killed from outside.
        """
        with self.lock:
            least, reason = self.exhausting.get(source, (inf, ""))
            if size >= least:
                # Trying again would take as long each time.
                raise NoReply(reason)
            for _ in range(2):
                reply = self._exchange(request)
                if reply.endswith(b"\n"):
                    return reply
                status = self.stop()
                if status not in EXTERNAL_SIGNALS:
                    if status == -signal.SIGPROF:
                        limit = f"{seconds} seconds of processor time"
                    else:
                        limit = f"{MAX_MEMORY >> 20} MiB, or crashed its process"
                    reason = f"it took more than {limit}"
                    # Half the size: shorter conversations still work, and a template that fails with any of them is
                    # soon not tried again.
                    self.exhausting[source] = (size / 2, reason)
                    raise NoReply(reason)
            raise NoReply("its process was killed twice; try again")

    def _exchange(self, request: bytes) -> bytes:
        """Sends a request and reads the line that answers it; less than a line if the process ends."""
        if self.process is None or self.process.poll() is not None:
            try:
                self.process = subprocess.Popen(
                    [sys.executable, "-P", __file__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
                )
            except OSError as error:
                raise NoReply(f"no process could be started for it ({error})") from None
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(request)
            stdin.flush()
            return stdout.readline()
        except BrokenPipeError:
            return b""
        except BaseException:
            # Interrupted: the next rendering must not read this one's reply.
            self.stop()
            raise

    def stop(self) -> int | None:
        """Ends the process; returns its exit status, None if there was no process."""
        process = self.process
        if process is None:
            return None
        self.process = None
        process.kill()
        # Leaving `with` closes the pipes, which first writes what the process has not read.
        with contextlib.suppress(BrokenPipeError), process:
            pass
        return process.wait()


_worker = _Worker()


def _forget_worker() -> None:
    global _worker
    _worker = _Worker()


# A forked process must not share its parent's pipes and lock.
os.register_at_fork(after_in_child=_forget_worker)


def render(source: str, variables: dict, limit: int) -> str:
    """The text that a template writes, at most `limit` characters.

    Raises:
        TemplateFailed: the template raised an error or exceeded a limit.
    """
    given = json.dumps(variables)
    request = f'["render", {MAX_SECONDS}, {json.dumps(source)}, {given}, {limit}]\n'.encode()
    return _answer(_worker.ask(source, request, len(given)))


def try_tokenizer(kind: str, content: str) -> str:
    """Why a tokenizer's file is refused, as tokenizer_probe.py finds; empty if it is not. Each is tried once.

    Raises:
        TemplateFailed: it cannot be read, or exceeded a limit.
    """
    digest = hashlib.sha256(content.encode()).hexdigest()
    if digest in _tried:
        return ""
    seconds = MAX_SECONDS + len(content) // BYTES_PER_SECOND
    request = json.dumps(["try", seconds, kind, content]).encode() + b"\n"
    if problem := _answer(_worker.ask(digest, request, len(content), seconds)):
        return problem
    _tried.add(digest)
    return ""


# The tokenizers that were not refused.
_tried: set[str] = set()


def _answer(reply: bytes) -> str:
    succeeded, text = json.loads(reply)
    if not succeeded:
        raise TemplateFailed(text)
    return text


# ----------------------------------------------------------------------------------------------------- in the process


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks an answer for transformers' own masks; only its body is rendered."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    """A template in the environment that chat templates expect (transformers, utils/chat_template_utils.py)."""

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    # Jinja's own escapes HTML.
    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment.from_string(source)


def _render(source: str, variables: dict, limit: int) -> str:
    text = ""
    for chunk in _compile(source).generate(variables):
        text += chunk
        if len(text) > limit:
            raise ValueError(f"it wrote more than {limit} characters")
    return text


def _reply(act: Callable[..., str], *arguments) -> bytes:
    try:
        reply = [True, act(*arguments)]
    except BaseException as error:
        # A template may raise anything, a tokenizer's library a panic of Rust.
        reply = [False, " ".join(str(error).split())[:1000] or type(error).__name__]
    return json.dumps(reply).encode() + b"\n"


def _serve() -> None:
    # Ctrl-C is for the other process; this one ends with its input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    # Opens what an escape, the time zone and an error need, while files can be opened.
    _reply(_render, "{{ '\\n' + strftime_now('%c') + 1 }}", {}, 0)
    acts = {"render": _render, "try": runpy.run_path(os.path.join(os.path.dirname(__file__), PROBE))["find_problem"]}
    limits = {"AS": MAX_MEMORY, "NOFILE": 3, "FSIZE": 0, "NPROC": 0, "CORE": 0}
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    for request in sys.stdin.buffer:
        act, seconds, *arguments = json.loads(request)
        # The timer's signal has no handler: it ends the process wherever it is.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        reply = _reply(acts[act], *arguments)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(reply)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve()
