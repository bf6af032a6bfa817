"""`python -m minorca.export`: weights for other engines."""

from pathlib import Path

from minorca import cli
from minorca.export.huggingface import export
from minorca.model.quantization import parse_quantization


def build_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="minorca.export", description="Writes a model, merged with an adapter, as a Hugging Face directory."
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="the base model's directory")
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter in PEFT's format to merge in")
    parser.add_argument("--output", required=True, metavar="DIR", help="a directory that does not exist yet")
    parser.add_argument("--format", choices=["hf"], default="hf", help="the layout to write")
    cli.add_quantization(parser, "nf4: write the weights in 4 bits, as bitsandbytes does")
    return parser


def main(argv: list[str]) -> None:
    args = build_parser().parse_args(argv)
    cli.outlive_readers()
    export(args.model, args.adapter, Path(args.output), parse_quantization(args.quantize, args.double_quant))


if __name__ == "__main__":
    cli.run(main)
