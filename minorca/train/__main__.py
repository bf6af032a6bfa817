"""Fine-tuning: `torchrun -m minorca.train --config FILE`, or `python -m minorca.train` as one process."""

import argparse
import logging
import os
import sys
import threading
import time

from minorca import cli
from minorca.config import Config
from minorca.errors import RunEnded, UserError
from minorca.host import is_first_rank
from minorca.train.dry_run import dry_run
from minorca.train.run import train


def build_parser() -> cli.Parser:
    parser = cli.config_parser("minorca.train", "Fine-tunes a Mistral model, with LoRA or all weights.")
    profile = "write a trace of the third step, and what holds memory, to OUTPUT/profile"
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--profile", action="store_true", help=profile)
    dry = "print how long the run is, a rendered row and the first micro-batch; write nothing (one process is enough)"
    instead.add_argument("--dry-run", action="store_true", help=dry)
    return parser


def main(argv: list[str]) -> None:
    # standard error is for errors and the progress bar
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("minorca").setLevel(logging.INFO if is_first_rank() else logging.ERROR)
    args, config = _parse(build_parser(), argv)
    # micro-batches of many lengths fragment a GPU's memory; read when CUDA starts
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if not args.dry_run:
        cli.outlive_readers()
        threading.excepthook = _report_of_thread
        train(config, args.profile)
    elif is_first_rank():
        dry_run(config)


def _report_of_thread(args: threading.ExceptHookArgs) -> None:
    # TensorBoard's hands its error to the run, which says it in a line
    if not type(args.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(args)


def _parse(parser: cli.Parser, argv: list[str]) -> tuple[argparse.Namespace, Config]:
    """The command line; where it is wrong, the first rank of each machine says so, for all have the same."""
    try:
        return cli.parse_config(parser, argv)
    except UserError:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            raise
        # torchrun ends this process once the first rank has failed
        time.sleep(60)
        raise RunEnded(2) from None


if __name__ == "__main__":
    cli.run(main)
