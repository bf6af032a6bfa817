"""Memory and speed of a run before anything is loaded: `python -m minorca.plan --config FILE`."""

import json

from minorca import cli
from minorca.errors import UserError
from minorca.plan.apart import plan_apart
from minorca.plan.devices import GPUS, here, machine
from minorca.plan.estimate import model_of
from minorca.plan.report import table
from minorca.train.inputs import check_length
from minorca.train.optim import check_optimizer


def build_parser() -> cli.Parser:
    parser = cli.config_parser("minorca.plan", "Predicts a training run's memory and speed; reads no weights.")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="ranks, each with one (default: 1)")
    names = ", ".join(gpu.name for gpu in GPUS)
    parser.add_argument("--gpu", metavar="NAME", help=f"{names}, or cpu (default: what is here)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: list[str]) -> None:
    args, config = cli.parse_config(build_parser(), argv)
    if args.gpus < 1:
        raise UserError(f"is {args.gpus}; expected at least 1", field="--gpus")
    check_optimizer(config.optim)
    device = machine(args.gpu, args.gpus) if args.gpu else here(args.gpus)
    check_optimizer(config.optim)
    config, arch = model_of(config)
    check_length(config.data.seq_len, arch)
    plan = plan_apart(config, arch, device, args.gpus)
    print(json.dumps(plan) if args.json else table(plan))


if __name__ == "__main__":
    cli.run(main)
