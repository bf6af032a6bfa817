"""Training steps by each kind of activation checkpointing, without a peer: python -m benchmarks.recompute

The rows, the micro-batches and the step are those of benchmarks.train_step. Of each kind a warm-up step, then --steps
timed ones; peak memory is what CUDA allocated, the weights included.
"""

import typing

import torch

from benchmarks.common import DEVICE, model_under_test, parser, report, spread
from benchmarks.train_step import SETTINGS, Ours, draw_rows, whole_step
from minorca.config import ParallelConfig
from minorca.model.lora import add_adapters, init_adapters, pad_for_adapters
from minorca.train.metrics import peak_memory_bytes
from minorca.train.parallel import checkpoint_activations

KINDS = typing.get_args(typing.get_type_hints(ParallelConfig)["activation_checkpointing"])


def main() -> None:
    options = parser("benchmarks.recompute", "LoRA training steps by each kind of activation checkpointing.")
    options.add_argument("--steps", type=int, default=3, metavar="N", help="timed steps of each kind; default: 3")
    options.add_argument("--tokens", type=int, default=4096, metavar="N", help="of a micro-batch; default: 4096")
    args = options.parse_args()
    rows = []
    with model_under_test(args) as (directory, model):
        store = draw_rows("full", model.arch.vocab_size, args.tokens)
        add_adapters(model, SETTINGS)
        pad_for_adapters(model)
        init_adapters(model, seed=0)
        for kind in KINDS:
            for block in model.layers:
                # what the kind before has put in its place
                vars(block).pop("forward", None)
            checkpoint_activations(model, kind)
            side = Ours(store, model, directory, {})
            row: dict = {"kind": kind}
            try:
                side.arrange(args.tokens)
                if DEVICE.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                whole_step(side)
                seconds = spread([whole_step(side) for _ in range(args.steps)])
                row |= {"seconds": seconds, "tokens_per_second": len(store.tokens) / seconds["median"]}
                # on a CPU the peak of the process, which no kind lowers again
                row |= {"peak_memory_bytes": peak_memory_bytes(DEVICE)} if DEVICE.type == "cuda" else {}
            except torch.OutOfMemoryError as error:
                row["failed"] = str(error).partition("\n")[0]
                side.optimizer.zero_grad()
                torch.cuda.empty_cache()
            rows.append(row)
    settings = {"model": args.shape or args.model.name, "dtype": args.dtype, "tokens": args.tokens}
    report({**settings, "layers": args.layers, "rows": rows}, "recompute", args.output)


if __name__ == "__main__":
    main()
