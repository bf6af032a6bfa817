"""Chat templates are programs from elsewhere: they run in Jinja's sandbox, and that in a process of its own.

Jinja's sandbox keeps a template from the interpreter, but not from all memory and time ('a' * 10**10, loops in loops, strings
that double), often within one call that nothing in the process can interrupt. The kernel can: it ends the process at its limits.
The process opens no file and starts no other, so that little is won by who gets out of Jinja's sandbox. It knows nothing
of minorca: this file is all it runs, and it imports in a tenth of a second.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from datetime import datetime
from functools import lru_cache
from math import inf

import jinja2
import jinja2.debug  # else imported at a template's first error, when no file can be opened any more
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS, MEMORY = (
    5,
    2**30,
)  # of one rendering, in processor time, and of the process; a rendering takes 0.1 ms and 30 MB
FROM_OUTSIDE = (
    -signal.SIGKILL,
    -signal.SIGTERM,
    -signal.SIGHUP,
)  # a user, or the system when it lacks memory: not the template


class TemplateFailed(Exception):
    """Says what a template raised, or which limit it met."""


class _Worker:
    """The process, started when it is first needed; one rendering at a time, from whichever thread."""

    def __init__(self):
        self.process, self.lock = None, threading.Lock()
        self.exhausting: dict[
            str, tuple[float, str]
        ] = {}  # by template: the size of variables that are too large, and why

    def ask(self, source: str, request: bytes, size: int) -> bytes:
        with self.lock:
            least, why = self.exhausting.get(source, (inf, ""))
            if size >= least:  # not again: it would cost as much each time
                raise TemplateFailed(why)
            for _ in range(2):
                if (reply := self._exchange(request)).endswith(b"\n"):
                    return reply
                if (status := self._end()) not in FROM_OUTSIDE:
                    timed_out = status == -signal.SIGPROF
                    what = (
                        f"{SECONDS} seconds of processor time"
                        if timed_out
                        else f"{MEMORY >> 20} MiB, or brought its process down"
                    )
                    # Half: shorter conversations of others go on, and a template that exhausts it with any is soon not tried again.
                    self.exhausting[source] = size / 2, (why := f"it took more than {what}")
                    raise TemplateFailed(why)
            raise TemplateFailed("its process was killed twice; try again")

    def _exchange(self, request: bytes) -> bytes:
        """A line; less where the process ends."""
        if self.process is None or self.process.poll() is not None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            try:
                self.process = subprocess.Popen([sys.executable, "-P", __file__], **pipes)
            except OSError as error:
                raise TemplateFailed(f"no process could be started for it ({error})") from None
        try:
            self.process.stdin.write(request)
            self.process.stdin.flush()
            return self.process.stdout.readline()
        except BrokenPipeError:
            return b""
        except BaseException:  # interrupted: the next rendering must not read this one's reply
            self._end()
            raise

    def _end(self) -> int:
        process, self.process = self.process, None
        process.kill()
        with (
            contextlib.suppress(BrokenPipeError),
            process,
        ):  # closes the pipes, for which what it never read is written once more
            pass
        return process.wait()


_worker = _Worker()
os.register_at_fork(after_in_child=_worker.__init__)  # a process's pipes are its own


def render(source: str, variables: dict, limit: int) -> str:
    """What a template writes, at most `limit` characters. Raises TemplateFailed."""
    given = json.dumps(variables)
    done, text = json.loads(_worker.ask(source, f"[{json.dumps(source)}, {given}, {limit}]\n".encode(), len(given)))
    if not done:
        raise TemplateFailed(text)
    return text


# ------------------------------------------------------------------------------------------------- in the process


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks an answer for transformers' own masks; here its body is all that counts."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    """A template in the environment that its kind is written for (transformers' utils/chat_template_utils.py)."""

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):  # Jinja's own escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment.from_string(source)


def _reply(source: str, variables: dict, limit: int) -> bytes:
    try:
        text = ""
        for chunk in _compile(source).generate(variables):
            text += chunk
            if len(text) > limit:
                raise ValueError(f"it wrote more than {limit} characters")
        done = True
    except Exception as error:  # whatever it raises is its own fault
        done, text = False, " ".join(str(error).split())[:1000] or type(error).__name__
    return json.dumps([done, text]).encode() + b"\n"


def _serve() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other process's affair; this one ends with its input
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    _reply(
        "{{ '\\n' + strftime_now('%c') + 1 }}", {}, 0
    )  # opens what an escape, the time zone and an error need, while it can
    limits = {"AS": MEMORY, "NOFILE": 3, "FSIZE": 0, "NPROC": 0, "CORE": 0}
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    for request in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal, nowhere handled, ends the process wherever it is
        reply = _reply(*json.loads(request))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(reply)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve()
