"""`python -m minorca.replay`: verifies a run, or what was made from one, and computes steps of a run again."""

import argparse
from pathlib import Path

from minorca import cli
from minorca.errors import UserError
from minorca.host import is_first_rank
from minorca.receipts import CHAIN
from minorca.replay.recompute import recompute
from minorca.replay.recorded_run import read_run
from minorca.replay.verify import verify_directory, verify_run, verify_scores
from minorca.train.checkpoint import PLACES


def build_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="minorca.replay",
        description="Verifies what a receipt vouches for, and computes steps of a run again. The settings below say "
        "where files of the run are that have moved.",
        allow_abbrev=False,
    )
    what = "the output of a run, a directory of weights with a receipt.json, or the JSON of an evaluation"
    parser.add_argument("path", type=Path, metavar="PATH", help=what)
    steps = "of a run: compute steps A+1 to B again, from the newest checkpoint up to step A, and compare"
    parser.add_argument("--steps", type=_steps, metavar="A:B", help=steps)
    cli.add_settings(parser, only=PLACES)
    return parser


def main(argv: list[str]) -> None:
    args = build_parser().parse_args(argv)
    path = args.path
    if (path / CHAIN).is_file():
        run = read_run(path, cli.given_settings(args))
        if is_first_rank():
            print(f"{path}: {verify_run(run)}")
        if args.steps:
            recompute(run, *args.steps)
        return
    if args.steps:
        raise UserError(f"has no {CHAIN}, by which a run's steps are compared", path=path)
    print(f"{path}: {verify_directory(path) if path.is_dir() else verify_scores(path)}")


def _steps(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise argparse.ArgumentTypeError(f"{text}: expected two steps, the first before the last, as 600:620")
    return int(first), int(last)


if __name__ == "__main__":
    cli.run(main)
