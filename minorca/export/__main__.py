"""`python -m minorca.export`: weights for other engines."""

from pathlib import Path

from minorca import cli
from minorca.errors import UserError
from minorca.export.consolidated import export_consolidated
from minorca.export.huggingface import export
from minorca.export.merging import METHODS, parse_merge
from minorca.model.quantization import parse_quantization


def main(argv: list[str]) -> None:
    parser = cli.Parser(
        prog="minorca.export",
        description="Writes a model, merged with adapters, as Hugging Face's files or as Mistral's own.",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="the base model's directory")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="DIR[=WEIGHT]",
        help="a LoRA adapter to merge in, in PEFT's format or mistral-finetune's; may be given several times",
    )
    parser.add_argument("--merge", choices=METHODS, help="how several adapters are combined (default: linear)")
    parser.add_argument(
        "--density", type=float, help="of ties and dare: the part of values that is kept (default: 0.5)"
    )
    parser.add_argument("--seed", type=int, help="of dare: of the values that are kept (default: 0)")
    parser.add_argument("--output", required=True, metavar="DIR", help="a directory that does not exist yet")
    parser.add_argument(
        "--format",
        choices=["hf", "consolidated"],
        default="hf",
        help="the layout to write: Hugging Face's, or Mistral's consolidated.safetensors (default: hf)",
    )
    cli.add_quantization(parser, "nf4: write the weights in 4 bits, as bitsandbytes does")
    args = parser.parse_args(argv)
    cli.outlive_readers()
    merge = parse_merge(args.adapter, args.merge, args.density, args.seed)
    quantization = parse_quantization(args.quantize, args.double_quant)
    if args.format == "consolidated":
        if quantization:
            raise UserError("is nf4, which Mistral's layout cannot hold; give --format hf", field="--quantize")
        export_consolidated(args.model, merge, Path(args.output))
    else:
        export(args.model, merge, Path(args.output), quantization)


if __name__ == "__main__":
    cli.run(main)
