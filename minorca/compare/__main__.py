"""`python -m minorca.compare A B`: two models or adapters on the same prompts, side by side."""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from minorca import cli
from minorca.compare.comparison import compare
from minorca.compare.page import TITLE, render_page
from minorca.compare.prompts import Prompt, Rendered, read_prompts, render_for
from minorca.compare.sides import Side, load, open_side
from minorca.config import choices
from minorca.data.chat_template import TEMPLATES
from minorca.errors import UserError, raise_problems
from minorca.files.atomic import check_output, write_file
from minorca.files.safe_io import user_path
from minorca.generate.request import default_max_length
from minorca.model.build import fast_dtype


def main(argv: list[str]) -> None:
    args = _parse(argv)
    page, numbers = _outputs(args.output)
    cli.outlive_readers()
    prompts, notes = read_prompts(args.prompts, args.format, args.limit)
    # plain text needs no template
    template = args.template if any(prompt.messages for prompt in prompts) else "none"
    a, b = (open_side(name, path, args.model, template) for name, path in (("A", args.a), ("B", args.b)))
    if args.model and not (a.adapter or b.adapter):
        raise UserError("is the base of adapters, and neither A nor B is one; leave it out", field="--model")
    kept, rendered, left_out = _render(prompts, (a, b), args.max_new_tokens)
    dtype = getattr(torch, args.dtype) if args.dtype else fast_dtype()
    runners = load((a, b), dtype, args.quantize, args.double_quant)
    result = compare(runners, kept, rendered, args.max_new_tokens) | {"left_out": left_out, "notes": notes}
    values = _json_values(result)
    write_file(numbers, json.dumps(values, ensure_ascii=False) + "\n")
    write_file(page, render_page(values))
    print("\n".join([*summary(result), f"{page}, {numbers}"]))


def build_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="minorca.compare",
        description="Compares two models or adapters on the same prompts: their greedy answers, how likely they find "
        "the same answers, and how far apart they are at each token. Writes a page to read, and the numbers beside it.",
    )
    parser.add_argument("a", metavar="A", help="a model or a LoRA adapter in PEFT's format: its directory or hub id")
    parser.add_argument("b", metavar="B", help="the other one")
    parser.add_argument("--model", metavar="DIR", help="the base of adapters; default: what they name")
    parser.add_argument(
        "--prompts",
        required=True,
        metavar="FILE",
        help="text with a prompt in each line, or a data set, whose answers are the reference answers",
    )
    parser.add_argument(
        "--format", choices=choices("data.format"), help="of a data set; default: text's lines, or openorca"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="use the first N prompts; default: all")
    parser.add_argument(
        "--template",
        choices=TEMPLATES,
        help="the chat template of both; default: that of each adapter's training, or auto",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="the longest answer, in tokens; default: 256"
    )
    cli.add_quantization(parser, "nf4: quantize the models while they load, as QLoRA adapters were trained on them")
    parser.add_argument(
        "--dtype",
        choices=choices("model.dtype"),
        help="of weights and computation; default: bfloat16 where this machine multiplies it in hardware",
    )
    parser.add_argument(
        "--output", required=True, metavar="FILE.html", help="the page to write; its numbers go to FILE.json"
    )
    return parser


def _parse(argv: list[str]) -> argparse.Namespace:
    args = build_parser().parse_args(argv)
    raise_problems(_problems(args))
    return args


def _problems(args: argparse.Namespace) -> Iterator[UserError]:
    for key in ("limit", "max_new_tokens"):
        value = getattr(args, key)
        if value is not None and value < 1:
            yield UserError(f"is {value}; expected at least 1", field=f"--{key.replace('_', '-')}")


def _outputs(path: str) -> tuple[Path, Path]:
    """The page and the file of its numbers, in a directory that can be written."""
    page = user_path(path)
    if page.suffix != ".html":
        raise UserError(f"is {path}; expected a name that ends in .html", field="--output")
    numbers = page.with_suffix(".json")
    check_output(page, TITLE, [numbers])
    return page, numbers


def _render(
    prompts: list[Prompt], sides: tuple[Side, Side], max_new_tokens: int
) -> tuple[list[Prompt], list[tuple[Rendered, Rendered]], list[str]]:
    """The prompts that both models have the positions for, each rendered for both; and the places of the others."""
    a, b = sides
    kept, rendered, left_out = [], [], []
    for prompt in prompts:
        of_sides = (render_for(prompt, a.tok, a.template), render_for(prompt, b.tok, b.template))
        needed = [max(len(r.ids), len(r.prompt) + max_new_tokens if r.prompt else 0) for r in of_sides]
        if any(length > default_max_length(side.arch) for length, side in zip(needed, sides)):
            left_out.append(f"{prompt.path}, {prompt.where}")
        else:
            kept.append(prompt)
            rendered.append(of_sides)
    if not kept:
        positions = min(default_max_length(side.arch) for side in sides)
        message = f"no prompt fits {positions} positions with {max_new_tokens} new tokens; lower --max-new-tokens"
        raise UserError(message, path=prompts[0].path)
    return kept, rendered, left_out


def _json_values(value: Any) -> Any:
    """The same with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _json_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_values(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary(result: dict[str, Any]) -> list[str]:
    """The overall numbers, in lines."""
    a, b, scored, difference, kl = (result[key] for key in ("a", "b", "scored", "difference", "kl"))
    lines = [f"{name}: {side['path']}, template {side['template']}" for name, side in (("A", a), ("B", b))]
    if scored:
        for key, label in (("perplexity", "perplexity"), ("perplexity_per_byte", "perplexity per byte")):
            lines.append(f"{label} of {scored}: A {a[key]:.4f}, B {b[key]:.4f}")
    if difference:
        low, high = difference["interval"]
        spread = f"standard error {difference['standard_error']:.4f}, 95% interval {low:+.4f} to {high:+.4f}"
        spread = "no standard error of one row" if difference["rows"] == 1 else spread
        lines.append(
            f"log-probability of a reference answer, A - B: mean {difference['mean']:+.4f} nats, {spread}, "
            f"p = {difference['p_value']:.4g}, {difference['rows']} row{'s' if difference['rows'] > 1 else ''}"
        )
    if kl:
        lines.append(f"nats per token: KL(A || B) {kl['kl_a_b']:.4g}, KL(B || A) {kl['kl_b_a']:.4g}")
    elif result["kl_refused"]:
        lines.append(f"no KL: {result['kl_refused']}")
    if result["answers"]:
        lines.append(f"{result['same_answers']} of {result['answers']} greedy answers are the same")
    if left_out := result["left_out"]:
        more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        lines.append(f"left out, too long for the models' positions: {left_out[0]}{more}")
    lines += [f"{count} rows: {note}" for note, count in result["notes"].items()]
    return lines


if __name__ == "__main__":
    cli.run(main)
