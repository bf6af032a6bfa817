"""`python -m minorca.export`: weights for other engines, and to the hub."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from minorca import cli
from minorca.errors import UserError, raise_problems
from minorca.export import gguf_adapter
from minorca.export.adapter import export_adapter
from minorca.export.card import Origin, read_origin, write_card
from minorca.export.consolidated import export_consolidated
from minorca.export.gguf import DEFAULT_TYPE, K_QUANTS, TYPES, export_gguf
from minorca.export.huggingface import export
from minorca.export.merging import METHODS, Merge, parse_merge
from minorca.export.push import check_push, push
from minorca.model.quantization import parse_quantization


def build_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="minorca.export",
        description="Writes a model, merged with adapters, or an adapter alone, in the form that another engine reads.",
    )
    parser.add_argument("--model", metavar="DIR", help="the base model: a directory, a hub id or a GGUF file")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="DIR[=WEIGHT]",
        help="a LoRA adapter to merge in, in PEFT's format or mistral-finetune's, or its hub id; may be given several "
        "times",
    )
    parser.add_argument("--merge", choices=METHODS, help="how several adapters are combined (default: linear)")
    parser.add_argument(
        "--density", type=float, help="of ties and dare: the part of values that is kept (default: 0.5)"
    )
    parser.add_argument("--seed", type=int, help="of dare: of the values that are kept (default: 0)")
    parser.add_argument("--adapter-only", action="store_true", help="write the adapter alone")
    parser.add_argument("--output", required=True, metavar="DIR", help="a directory that does not exist yet")
    parser.add_argument(
        "--format",
        choices=["hf", "consolidated", "gguf"],
        default="hf",
        help="the layout to write: Hugging Face's, Mistral's own, or that of llama.cpp (default: hf)",
    )
    parser.add_argument(
        "--type", choices=[*TYPES, *K_QUANTS], help=f"of gguf: how matrices are stored (default: {DEFAULT_TYPE})"
    )
    cli.add_quantization(parser, "of hf: nf4 writes the weights in 4 bits, as bitsandbytes does")
    parser.add_argument("--push", metavar="ORG/NAME", help="upload the directory to the hub, with a model card")
    parser.add_argument("--private", action="store_true", help="with --push: make a private repository")
    parser.add_argument(
        "--scores", nargs="+", default=[], metavar="FILE", help="with --push: results of minorca.evaluate, for the card"
    )
    return parser


def main(argv: list[str]) -> None:
    args = build_parser().parse_args(argv)
    merge = parse_merge(args.adapter, args.merge, args.density, args.seed)
    raise_problems(_problems(args, merge))
    cli.outlive_readers()
    output = Path(args.output)
    origin = None
    if args.push:
        check_push(args.push, args.private)
        adapters = [str(adapter.directory) for adapter in merge.adapters] if merge else []
        origin = read_origin(args.model, adapters, args.adapter_only, args.quantize != "none", args.scores)
    if merge and args.adapter_only:
        _export_adapter(args, merge, output, origin)
    elif args.format == "gguf":
        export_gguf(args.model, merge, output, args.type or DEFAULT_TYPE)
    elif args.format == "consolidated":
        export_consolidated(args.model, merge, output)
    else:
        export(args.model, merge, output, parse_quantization(args.quantize, args.double_quant))
    if origin:
        write_card(origin, output, args.push)
        print(push(output, args.push, args.private))


def _export_adapter(args: argparse.Namespace, merge: Merge, output: Path, origin: Origin | None) -> None:
    ((adapter, _),) = merge.adapters
    if args.format == "gguf":
        gguf_adapter.export_adapter(args.model, adapter, output, args.type or gguf_adapter.DEFAULT_TYPE)
    else:
        export_adapter(adapter, output, origin and origin.base)


def _problems(args: argparse.Namespace, merge: Merge | None) -> Iterator[UserError]:
    if args.model is None and not (args.adapter_only and args.format == "hf"):
        yield UserError("is missing; expected a model's directory, hub id or GGUF file", field="--model")
    if args.adapter_only and (merge is None or [adapter.weight for adapter in merge.adapters] != [1]):
        yield UserError("needs one --adapter, without a weight", field="--adapter-only")
    if args.adapter_only and args.merge:
        yield UserError("changes nothing with --adapter-only, which writes one adapter", field="--merge")
    if args.adapter_only and args.format == "consolidated":
        yield UserError("is of --format hf and gguf; Mistral's layout has no adapters", field="--adapter-only")
    if args.quantize != "none" and (args.format != "hf" or args.adapter_only):
        advice = "; choose a --type, such as q4_0" if args.format == "gguf" else ""
        yield UserError(f"is an option of --format hf, of whole models{advice}", field="--quantize")
    if args.type and args.format != "gguf":
        yield UserError("is an option of --format gguf", field="--type")
    for option in ("private", "scores"):
        if getattr(args, option) and not args.push:
            yield UserError("needs --push", field=f"--{option}")


if __name__ == "__main__":
    cli.run(main)
