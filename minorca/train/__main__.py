"""Fine-tuning: `torchrun -m minorca.train --config FILE`, or `python -m minorca.train` as one process."""

import logging
import os
import sys
import time

from minorca import cli
from minorca.config import config_parser, read_config
from minorca.errors import RunEnded, UserError
from minorca.train.loop import train


def main(argv: list[str]) -> None:
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", stream=sys.stdout
    )  # standard error is for errors and the bar
    logging.getLogger("minorca").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    parser = config_parser("minorca.train", "Fine-tunes a Mistral model with LoRA.")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="write a trace of the third step, and what holds memory, to OUTPUT/profile",
    )
    try:
        args, surplus = parser.parse_known_args(argv)
        config = read_config(args, surplus)
    except UserError:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            raise
        time.sleep(60)  # all ranks of a machine were told the same, one says it, and then torchrun ends the others
        raise RunEnded(2) from None
    train(config, args.profile)


if __name__ == "__main__":
    cli.run(main)
