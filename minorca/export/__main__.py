"""`python -m minorca.export`: weights for other engines, and to the hub."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from minorca import cli
from minorca.errors import UserError, raise_problems
from minorca.export.adapter import export_adapter
from minorca.export.card import read_origin, write_card
from minorca.export.huggingface import export
from minorca.export.push import check_push, push
from minorca.model.quantization import parse_quantization


def main(argv: list[str]) -> None:
    args = _parse(argv)
    cli.outlive_readers()
    output = Path(args.output)
    quantization = parse_quantization(args.quantize, args.double_quant)
    origin = None
    if args.push:
        check_push(args.push)
        origin = read_origin(args.model, args.adapter, args.adapter_only, bool(quantization), args.scores)
    if args.adapter_only:
        export_adapter(args.adapter, output, origin and origin.base)
    else:
        export(args.model, args.adapter, output, quantization)
    if origin:
        write_card(origin, output, args.push)
        print(push(output, args.push, args.private))


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(
        prog="minorca.export",
        description="Writes a model, merged with adapters, as Hugging Face's files or as Mistral's own.",
    )
    parser.add_argument("--model", metavar="DIR", help="the base model's directory or hub id")
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter in PEFT's format, or its hub id, to merge in")
    parser.add_argument("--adapter-only", action="store_true", help="write the adapter alone")
    parser.add_argument("--output", required=True, metavar="DIR", help="a directory that does not exist yet")
    parser.add_argument(
        "--format",
        choices=["hf", "consolidated"],
        default="hf",
        help="the layout to write: Hugging Face's, or Mistral's consolidated.safetensors (default: hf)",
    )
    cli.add_quantization(parser, "nf4: write the weights in 4 bits, as bitsandbytes does")
    parser.add_argument("--push", metavar="ORG/NAME", help="upload the directory to the hub, with a model card")
    parser.add_argument("--private", action="store_true", help="with --push: make a private repository")
    parser.add_argument(
        "--scores", nargs="+", default=[], metavar="FILE", help="with --push: results of minorca.evaluate, for the card"
    )
    args = parser.parse_args(argv)
    raise_problems(_problems(args))
    return args


def _problems(args: argparse.Namespace) -> Iterator[UserError]:
    if args.model is None and not args.adapter_only:
        yield UserError("is missing; expected a model's directory or hub id", field="--model")
    if args.adapter_only and (args.adapter is None or args.quantize != "none"):
        yield UserError("needs --adapter, and cannot be combined with --quantize", field="--adapter-only")
    for option in ("private", "scores"):
        if getattr(args, option) and not args.push:
            yield UserError("needs --push", field=f"--{option}")


if __name__ == "__main__":
    cli.run(main)
