"""Greedy generation, minorca beside transformers and beside its limit: python -m benchmarks.decode

Decoding: both continue the same random prompts of equal length with the same weights and no stop ids: minorca's engine
with as many slots as there are prompts, and transformers' generate with its defaults (SDPA, its dynamic cache). A
step's time is that of the steps in which all sequences decode, from the arrival of their third tokens to that of their
last but one, over their number: nothing waits for the device in between, so that the host's work may overlap with the
device's. Runs alternate; the median is over runs. Beside them, in the same rounds, stands
the limit: every weight multiplied once by as many rows, by the same calls as in the engine (prepacked on a CPU), and
nothing else. Bandwidth counts what a step must read: every weight (of an embedding that is not the head, nothing) and
the filled part of the cache, divided by a copy's bytes per second on the same machine.

First token: from the request until its id is on the host, for prompts of each length, none of which the cache holds.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import DEVICE, clock, model_under_test, parser, peer, report, spread
from benchmarks.device import copy_bandwidth
from minorca.generate.engine import Engine
from minorca.generate.request import Request
from minorca.model.build import prepack
from minorca.model.network import Mistral

ROUNDS = 5


def step_bytes(model: Mistral, weights: int, batch: int, length: float) -> float:
    """Bytes that a decoding step reads, if each of `batch` sequences has `length` tokens."""
    arch = model.arch
    element = model.embedding.weight.element_size()
    keys = min(length, arch.window or length)
    return element * (weights + 2 * batch * keys * arch.layers * arch.kv_heads * arch.head_dim)


def products(model: Mistral, rows: int) -> list[Callable[[], Tensor]]:
    """The engine's products with weights, on random rows: each weight once."""
    head = model.embedding if model.head is None else model.head
    calls = []
    for weight in (*(projection.base for _, projection in model.projections()), head):
        x = torch.randn(rows, weight.in_features, device=DEVICE).to(model.embedding.weight.dtype)
        calls.append(functools.partial(weight.linear, x))
    return calls


@torch.inference_mode()
def limit(model: Mistral, rows: int, steps: int) -> float:
    """Mean seconds of all products with weights; on CUDA as a CUDA graph, like the engine's step."""
    calls = products(model, rows)

    def run_all() -> None:
        for call in calls:
            call()

    run_all()
    step = run_all
    if DEVICE.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run_all()
        step = graph.replay
    return _timed(lambda: [step() for _ in range(steps)]) / steps


def _timed(run: Callable) -> float:
    start = clock()
    run()
    return clock() - start


class Stamps:
    """The time at which each token is on the host: a streamer for transformers, which puts the prompt first."""

    def __init__(self):
        self.times = []

    def put(self, ids: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def our_run(model: Mistral, prompts: Tensor, new: int) -> tuple[list[list[int]], float]:
    """The new ids of each prompt, and a decoding step's mean seconds."""
    engine = Engine(model, len(prompts), prompts.shape[1] + new)
    outs: dict[Request, list[int]] = {}
    # Tokens of each sequence on the host, and when.
    times: list[tuple[int, float]] = []
    for prompt in prompts.tolist():
        request = Request(prompt, new)
        engine.add(request)
        outs[request] = []
    while engine.busy:
        for token in engine.step():
            outs[token.request].append(token.id)
        counts = list(map(len, outs.values()))
        if min(counts) > 2 and max(counts) < new:
            times.append((min(counts), time.perf_counter()))
    return list(outs.values()), step_seconds(times)


def step_seconds(times: list[tuple[int, float]]) -> float:
    """Mean seconds of a token, from (tokens, time) in order."""
    (first, start), *_, (last, stop) = times
    return (stop - start) / (last - first)


def their_run(model: Any, prompts: Tensor, new: int) -> tuple[list[list[int]], float]:
    """The same of transformers."""
    stamps = Stamps()
    mask = torch.ones_like(prompts)
    out = model.generate(
        prompts, attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=0, streamer=stamps
    )
    return out[:, prompts.shape[1] :].tolist(), step_seconds(list(enumerate(stamps.times))[3:new])


def random_prompts(model: Mistral, batch: int, length: int) -> Tensor:
    return torch.randint(model.arch.vocab_size, (batch, length), generator=torch.Generator().manual_seed(batch)).to(
        DEVICE
    )


def decoding(model: Mistral, theirs: Any, weights: int, batch: int, length: int, new: int, bandwidth: float) -> dict:
    prompts = random_prompts(model, batch, length)
    ids = our_run(model, prompts, new)[0], their_run(theirs, prompts, new)[0]
    same = [a == b for one, other in zip(*ids) for a, b in zip(one, other, strict=True)]
    seconds = {"ours": [], "theirs": [], "limit": []}
    for _ in range(ROUNDS):
        seconds["limit"].append(limit(model, batch, new // 2))
        seconds["ours"].append(our_run(model, prompts, new)[1])
        seconds["theirs"].append(their_run(theirs, prompts, new)[1])
    result = {"batch": batch, "prompt_tokens": length, "new_tokens": new, "same_ids": sum(same) / len(same)}
    for name, values in seconds.items():
        step = spread(values)
        result[name] = {"step_seconds": step, "tokens_per_second": batch / step["median"]}
    ours = result["ours"]["step_seconds"]["median"]
    return result | {
        "of_limit": result["limit"]["step_seconds"]["median"] / ours,
        "of_bandwidth": step_bytes(model, weights, batch, length + new / 2) / ours / bandwidth,
        "ratio": result["theirs"]["step_seconds"]["median"] / ours,
    }


def first_token(model: Mistral, theirs: Any, length: int) -> dict:
    engine = Engine(model, 1, length + 1)
    sides: dict[str, Callable[[Tensor], object]] = {
        "ours": lambda prompt_1T: list(engine.stream(Request(prompt_1T[0].tolist(), 1))),
        "theirs": lambda prompt_1T: theirs.generate(
            prompt_1T, attention_mask=torch.ones_like(prompt_1T), do_sample=False, max_new_tokens=1, pad_token_id=0
        ),
    }
    seconds = {name: [] for name in sides}
    # another prompt in every round: the engine keeps what it has computed
    for prompt_1T in random_prompts(model, ROUNDS + 1, length).split(1):
        for name, side in sides.items():
            seconds[name].append(_timed(functools.partial(side, prompt_1T)))
    result = {name: spread(values[1:]) for name, values in seconds.items()}
    return {"prompt_tokens": length, **result, "ratio": result["theirs"]["median"] / result["ours"]["median"]}


def main() -> None:
    options = parser("benchmarks.decode", "Greedy generation, minorca beside transformers and its limit.")
    options.add_argument("--batch", default="1,8,32", metavar="N,N", help="sequences at once; default 1,8,32")
    options.add_argument("--prompt-tokens", type=int, default=32, metavar="N", help="length of the prompts; default 32")
    options.add_argument("--new-tokens", type=int, default=64, metavar="N", help="at least 8; default 64")
    options.add_argument(
        "--first-token", default="16,128,512", metavar="N,N", help="lengths of the prompts whose first token is timed"
    )
    args = options.parse_args()
    bandwidth = copy_bandwidth()
    with model_under_test(args) as (directory, model):
        theirs: Any = peer(directory, model)
        theirs.generation_config.eos_token_id = None
        unread = 0 if model.arch.tied else model.embedding.weight.numel()
        weights = sum(p.numel() for p in model.parameters()) - unread
        batches = sorted(map(int, args.batch.split(",")))
        lengths = list(map(int, args.first_token.split(",")))
        plain = {batch: limit(model, batch, args.new_tokens // 2) for batch in batches}
        # for one sequence most weights keep their layout
        decoded = [
            decoding(prepack(model, batch), theirs, weights, batch, args.prompt_tokens, args.new_tokens, bandwidth)
            | {"products_without_prepacking_seconds": plain[batch]}
            for batch in batches
        ]
        first = [first_token(model, theirs, length) for length in lengths]
    settings = {"model": args.shape or args.model.name, "layers": args.layers, "dtype": args.dtype}
    report(
        {**settings, "copy_bytes_per_second": bandwidth, "decoding": decoded, "first_token": first},
        "decode",
        args.output,
    )


if __name__ == "__main__":
    main()
