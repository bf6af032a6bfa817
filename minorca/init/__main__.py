"""`python -m minorca.init`: writes a configuration from four answers: a model, data, a card and a goal."""

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from minorca import cli
from minorca.errors import UserError, raise_problems
from minorca.files.atomic import create_file
from minorca.files.safe_io import user_path
from minorca.init.answers import (
    GOALS,
    THIS_MACHINE,
    Data,
    check_card,
    check_data,
    check_goal,
    check_model,
    default_goal,
)
from minorca.init.settings import choose, file_text, tokens_of
from minorca.plan.devices import GPUS, Machine
from minorca.plan.report import table

Answer = TypeVar("Answer")
# where the first questions look for what they propose
MODELS = ("models/*/config.json", "examples/*/config.json")
ROWS = ("data/*.jsonl", "data/*.parquet", "examples/data/train.jsonl")
QUESTIONS = {
    "model": "model (a directory or a hub id)",
    "data": "data (a file, a directory or a hub id)",
    "gpu": f"card ({', '.join(gpu.name for gpu in GPUS)}, cpu, or {THIS_MACHINE})",
    "goal": "goal (" + "; ".join(f"{name}: {about}" for name, about in GOALS.items()) + ")",
}


def build_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="minorca.init",
        description="Writes a configuration from four answers, with settings that fit the card. What no option "
        "says is asked in the terminal.",
    )
    parser.add_argument("--model", metavar="DIR", help="the base model's directory or hub id")
    parser.add_argument("--data", metavar="FILE", help="rows: a file, a directory, a glob or a hub id")
    parser.add_argument("--gpu", metavar="NAME", help=QUESTIONS["gpu"])
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="ranks, each with one (default: 1)")
    parser.add_argument("--goal", metavar="GOAL", help=QUESTIONS["goal"])
    parser.add_argument("--output", metavar="FILE", default="run.yaml", help="the file to write (default: run.yaml)")
    return parser


def main(argv: list[str]) -> None:
    args = build_parser().parse_args(argv)
    output = _check(args)
    model = _answer(args, "model", check_model, _first_of(MODELS, parent=True))
    data = _answer(args, "data", check_data, _first_of(ROWS))
    print(f"{data.path}: format {' or '.join(data.formats)}" + (f", {data.count:,} rows" if data.count else ""))
    while True:
        device = _answer(args, "gpu", lambda text: check_card(text, args.gpus), THIS_MACHINE)
        goal = _answer(args, "goal", lambda text: check_goal(text, model, data), default_goal(data))
        try:
            settings, plan, lengths = choose(model, data, device, goal, args.gpus)
            break
        except UserError as error:
            # another card or goal may need less memory
            if error.field != "--gpu" or (args.gpu and args.goal):
                raise
            _say(error)
    lines = _figures(plan, data, lengths)
    text = file_text(settings, [f"By minorca init, for {goal} on {_cards(device, args.gpus)}:", *lines[-1:]])
    create_file(output, text)
    print("\n".join(lines))
    _print_next(output, args.gpus)


def _check(args: argparse.Namespace) -> Path:
    """Raises UserError: an answer that is missing where nobody can be asked; an output that cannot be made."""
    missing = [name for name in QUESTIONS if getattr(args, name) is None]
    problems = []
    if not sys.stdin.isatty():
        problems += [UserError("is missing; give it, or answer in a terminal", field=f"--{name}") for name in missing]
    if args.gpus < 1:
        problems.append(UserError(f"is {args.gpus}; expected at least 1", field="--gpus"))
    output = user_path(args.output)
    if output.exists():
        problems.append(UserError("exists, and is not replaced; choose another --output", path=output))
    elif not output.parent.is_dir():
        problems.append(UserError("no such directory; make it, or choose another --output", path=output.parent))
    raise_problems(problems)
    return output


def _answer(args: argparse.Namespace, name: str, check: Callable[[str], Answer], default: str | None) -> Answer:
    """The checked value of an option, or of the first answer in the terminal that passes the check."""
    if (given := getattr(args, name)) is not None:
        return check(given)
    # with readline, `input` supports editing
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    shown = f" [{default}]" if default else ""
    while True:
        try:
            text = input(f"{QUESTIONS[name]}{shown}: ").strip() or default
        except EOFError:
            print()
            raise UserError("has no answer; nothing was written", field=f"--{name}") from None
        if not text:
            continue
        try:
            return check(text)
        except UserError as error:
            _say(error)


def _say(error: UserError) -> None:
    for problem in error.problems:
        print(f"  {problem}")


def _first_of(patterns: tuple[str, ...], parent: bool = False) -> str | None:
    """The first file that is here, or its directory."""
    found = (path for pattern in patterns for path in sorted(Path().glob(pattern)))
    return next((str(path.parent if parent else path) for path in found), None)


def _cards(device: Machine, ranks: int) -> str:
    return f"{ranks} x {device.name}"


def _figures(plan: dict[str, Any], data: Data, lengths: list[int]) -> list[str]:
    """The plan's table, and how long an epoch takes."""
    tokens, speed = tokens_of(data, lengths), plan["tokens_per_second"]
    epoch = f"an epoch has about {tokens:,} tokens" if tokens else "the tokens of an epoch are not counted"
    if tokens and speed:
        epoch += f", and takes about {_duration(tokens / speed)}"
    elif not speed:
        epoch += "; its time is not predicted on this device"
    return [*table(plan).splitlines(), epoch]


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.0f} seconds"
    return f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"


def _print_next(output: Path, ranks: int) -> None:
    run = f"torchrun --nproc-per-node {ranks}" if ranks > 1 else "python"
    print(f"wrote {output}; look at what a run would do, then train:")
    print(f"  python -m minorca.train --config {output} --dry-run")
    print(f"  {run} -m minorca.train --config {output}")


if __name__ == "__main__":
    cli.run(main)
