"""The README as a new user follows it: python -m benchmarks.new_user [--output FOLDER]

Its commands, in their order, in one shell and nothing else typed, on a fresh clone of what is committed here, with an
empty home directory: no environment, no cache, no model. Those that need a GPU or a 7B model are left out, and a server
runs on behind the commands after it. Seconds a command, those of installation and downloads included.
"""

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import ROOT, report

# a server answers here when it is ready
HEALTH = "http://127.0.0.1:8000/health"
LEFT_OUT = {"gpu", "7b"}


def commands() -> Iterator[tuple[str, bool]]:
    """The README's commands for bash, and whether each is a server."""
    for needs, text in re.findall(
        r"^```bash(?: needs=([\w ]+))?\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S
    ):
        if not LEFT_OUT & set(needs.split()):
            yield text, "background" in needs


def script(record: Path) -> str:
    """All commands; after each, a line of the record has the time."""
    stamp = f"date +%s.%N >> {record}"
    lines = ["set -eu", stamp]
    for text, is_server in commands():
        if is_server:
            lines += [text.strip() + " &", "server=$!", f"until curl -sf {HEALTH}; do kill -0 $server; sleep 0.2; done"]
        else:
            lines += [text.strip()]
        lines += [stamp]
    return "\n".join([*lines, "kill $server", "wait $server || test $? = 143"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        clone, home, record = (Path(directory, name) for name in ("minorca", "home", "record"))
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        home.mkdir()
        # nothing of the environment that this program runs in
        own = ("PYTHON", "VIRTUAL_ENV", "XDG_CACHE_HOME", "HF_HOME", "OMP_NUM_THREADS")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        programs = [path for path in environment["PATH"].split(":") if not path.startswith(str(ROOT))]
        environment |= {"HOME": str(home), "PATH": ":".join(programs)}
        subprocess.run(["bash", "-c", script(record)], cwd=clone, env=environment, check=True)
        times = [float(line) for line in record.read_text().split()]
    seconds = [stop - start for start, stop in zip(times, times[1:])]
    table = {text.strip(): passed for (text, _), passed in zip(commands(), seconds)}
    report({"seconds": table, "total_seconds": sum(seconds)}, "new-user", args.output)


if __name__ == "__main__":
    main()
