"""First-step gradients, ours and PEFT's, beside PEFT's in fp32: python -m benchmarks.gradients --shape 7b --layers 8

Rows, weights and adapters are those of benchmarks.train_step, but for B, which is drawn, so that A has gradients too.
For each kind of matrix: the cosine with the gradient in fp32 and the ratio of norms, the worst of all layers.
"""

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import model_under_test, parser, report
from benchmarks.train_step import SETTINGS, SIDES, Ours, Theirs, draw_rows
from minorca.model.lora import adapter_parameters, add_adapters, init_adapters, pad_for_adapters
from minorca.model.network import Mistral


def gradients(side: Ours | Theirs, model: Mistral) -> dict[str, Tensor]:
    """PEFT's tensor name -> its gradient after all micro-batches of a step."""
    steps = side.step()
    # forward and backward of each micro-batch; the optimizer is not reached
    for _ in range(2 * len(side.batches)):
        next(steps)
    peer: Any = getattr(side, "model", None)
    ours = isinstance(side, Ours)
    found = adapter_parameters(model) if ours else {n: p for n, p in peer.named_parameters() if p.requires_grad}
    values = {}
    parameter: Any
    for name, parameter in found.items():
        values[name.replace(".default", "")] = parameter.grad.float()
        parameter.grad = None
    return values


def compared(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """(q_proj.lora_A, and so on) -> the lowest cosine, and the ratio of norms that is farthest from 1."""
    rows: dict[str, dict[str, float]] = {}
    for name, reference in exact.items():
        kind = ".".join(name.split(".")[-3:-1])
        row = rows.setdefault(kind, {"cosine": 1.0, "norm": 1.0})
        cosine = torch.cosine_similarity(found[name].flatten(), reference.flatten(), 0).item()
        norm = (found[name].norm() / reference.norm()).item()
        row["cosine"] = min(row["cosine"], cosine)
        row["norm"] = max(row["norm"], norm, key=lambda value: abs(value - 1))
    return rows


def main() -> None:
    options = parser("benchmarks.gradients", "First-step gradients, ours and PEFT's, beside PEFT's in fp32.")
    options.add_argument("--tokens", type=int, default=2048, metavar="N", help="of a micro-batch; default: 2048")
    args = options.parse_args()
    with model_under_test(args) as (directory, model):
        store = draw_rows("full", model.arch.vocab_size, args.tokens)
        add_adapters(model, SETTINGS)
        pad_for_adapters(model)
        init_adapters(model, seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in adapter_parameters(model).items():
                if "lora_B" in name:
                    parameter.copy_(1e-3 * torch.randn(parameter.shape, generator=generator))
        adapter = {name: p.detach().cpu().clone() for name, p in adapter_parameters(model).items()}
        sides = {name: side(store, model, Path(directory), adapter) for name, side in SIDES["sft"].items()}
        found = {}
        for name, side in sides.items():
            side.arrange(args.tokens)
            found[name] = gradients(side, model)
        theirs: Any = sides["theirs"]
        theirs.model.float()
        theirs.precision = contextlib.nullcontext()
        exact = gradients(theirs, model)
    settings = {"model": args.shape or args.model.name, "layers": args.layers, "dtype": args.dtype}
    result = {name: compared(values, exact) for name, values in found.items()}
    report({**settings, "tokens": args.tokens, **result}, "gradients", args.output)


if __name__ == "__main__":
    main()
