"""Greedy generation, minorca beside transformers: python -m benchmarks.generation

Both continue the same random prompts of equal length with the same weights and no stop: minorca.generate, and transformers'
generate as it comes (SDPA, its dynamic cache). The first token's time is from the call until the token is on the host; a
decoding step is the mean of those after it. Runs alternate. Bandwidth counts what a decoding step must read, every weight (of an
embedding that is not the head, nothing) and the cache's filled part, against a copy's bytes a second on the same machine.
"""

import torch
from torch import Tensor, nn

from benchmarks.common import DEVICE, clock, model_under_test, parser, peer, report, spread
from benchmarks.device import copy_bandwidth
from minorca.generate import decode
from minorca.model import Mistral

ROUNDS = 3


def step_bytes(model: Mistral, batch: int, length: float) -> float:
    """Bytes a decoding step reads where each of `batch` sequences has `length` tokens."""
    arch, element = model.arch, model.embedding.weight.element_size()
    weights = sum(p.numel() for p in model.parameters()) - (0 if arch.tied else model.embedding.weight.numel())
    keys = min(length, arch.window or length)
    return element * (weights + 2 * batch * keys * arch.layers * arch.kv_heads * arch.head_dim)


class Stamps:
    """When each token was ready: a streamer for transformers, which puts the prompt first."""

    def __init__(self):
        self.start, self.times = clock(), []

    def put(self, ids: Tensor) -> None:
        self.times.append(clock())

    def end(self) -> None:
        pass


def our_run(model: Mistral, prompts: Tensor, new: int) -> tuple[list[list[int]], list[float]]:
    """The new ids of each prompt, and the seconds at which each step's were on the host."""
    stamps, steps = Stamps(), []
    for ids in decode(model, prompts.tolist(), new):
        steps.append(ids.tolist())
        stamps.put(ids)
    return list(map(list, zip(*steps))), [time - stamps.start for time in stamps.times]


def their_run(model: nn.Module, prompts: Tensor, new: int) -> tuple[list[list[int]], list[float]]:
    """The same of transformers."""
    stamps, mask = Stamps(), torch.ones_like(prompts)
    out = model.generate(prompts, attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=0, streamer=stamps)
    return out[:, prompts.shape[1] :].tolist(), [time - stamps.start for time in stamps.times[1:]]


def compare(model: Mistral, theirs: nn.Module, batch: int, length: int, new: int, bandwidth: float) -> dict:
    generator = torch.Generator().manual_seed(batch)
    prompts = torch.randint(model.arch.vocab_size, (batch, length), generator=generator).to(DEVICE)
    sides = {"ours": lambda: our_run(model, prompts, new), "theirs": lambda: their_run(theirs, prompts, new)}
    ids = {name: side()[0] for name, side in sides.items()}
    runs = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, side in sides.items():
            runs[name].append(side()[1])
    same = [a == b for ours, theirs in zip(*ids.values()) for a, b in zip(ours, theirs, strict=True)]
    result = {"batch": batch, "prompt_tokens": length, "new_tokens": new, "same_ids": sum(same) / len(same)}
    for name in sides:
        step = spread([(times[-1] - times[0]) / (new - 1) for times in runs[name]])
        result[name] = {
            "first_token_seconds": spread([times[0] for times in runs[name]]),
            "step_seconds": step,
            "tokens_per_second": batch / step["median"],
            "bandwidth": step_bytes(model, batch, length + new / 2) / step["median"] / bandwidth,
        }
    return result | {"ratio": result["ours"]["tokens_per_second"] / result["theirs"]["tokens_per_second"]}


def main() -> None:
    options = parser("benchmarks.generation", "Greedy generation, minorca beside transformers.")
    options.add_argument("--batch", default="1,8", metavar="N,N", help="sequences at once; default 1,8")
    options.add_argument("--prompt-tokens", type=int, default=128, metavar="N")
    options.add_argument("--new-tokens", type=int, default=64, metavar="N", help="at least 2")
    args = options.parse_args()
    bandwidth = copy_bandwidth()
    with model_under_test(args) as (directory, model):
        theirs = peer(directory, model)
        theirs.generation_config.eos_token_id = None
        batches = map(int, args.batch.split(","))
        runs = [compare(model, theirs, batch, args.prompt_tokens, args.new_tokens, bandwidth) for batch in batches]
    settings = {"model": args.shape or args.model.name, "layers": args.layers, "dtype": args.dtype}
    report({**settings, "copy_bytes_per_second": bandwidth, "runs": runs}, "generation", args.output)


if __name__ == "__main__":
    main()
