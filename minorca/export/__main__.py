"""`python -m minorca.export`: weights for other engines."""

import argparse
from pathlib import Path

from minorca import cli
from minorca.errors import UserError
from minorca.export.gguf import DEFAULT_TYPE, K_QUANTS, TYPES, export_gguf
from minorca.export.gguf_adapter import export_adapter
from minorca.export.huggingface import export
from minorca.model.quantization import Quantization, parse_quantization


def main(argv: list[str]) -> None:
    parser = cli.Parser(
        prog="minorca.export",
        description="Writes a model, merged with an adapter, in the form that another engine reads.",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="the base model's directory")
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter in PEFT's format to merge in")
    parser.add_argument("--output", required=True, metavar="DIR", help="a directory that does not exist yet")
    parser.add_argument("--format", choices=["hf", "gguf"], default="hf", help="the layout to write")
    parser.add_argument(
        "--type", choices=[*TYPES, *K_QUANTS], help=f"of gguf: how matrices are stored ({DEFAULT_TYPE})"
    )
    parser.add_argument("--adapter-only", action="store_true", help="of gguf: the adapter, which is not merged")
    cli.add_quantization(parser, "nf4: write the weights in 4 bits, as bitsandbytes does")
    args = parser.parse_args(argv)
    cli.outlive_readers()
    output, quantization = Path(args.output), parse_quantization(args.quantize, args.double_quant)
    if args.format == "gguf":
        _export_gguf(args, output, quantization)
        return
    for option in ("type", "adapter_only"):
        if getattr(args, option):
            message = "is an option of --format gguf; an adapter's directory is in PEFT's format already"
            raise UserError(message, field=f"--{option.replace('_', '-')}")
    export(args.model, args.adapter, output, quantization)


def _export_gguf(args: argparse.Namespace, output: Path, quantization: Quantization | None) -> None:
    if quantization:
        raise UserError("is an option of --format hf; choose a --type, such as q4_0", field="--quantize")
    if not args.adapter_only:
        export_gguf(args.model, args.adapter, output, args.type or DEFAULT_TYPE)
    elif args.adapter is None:
        raise UserError("needs --adapter, the adapter to write", field="--adapter-only")
    else:
        # in the type of adapters, where none is given
        export_adapter(args.model, args.adapter, output, *filter(None, [args.type]))


if __name__ == "__main__":
    cli.run(main)
