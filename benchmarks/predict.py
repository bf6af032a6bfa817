"""A training step and decoding of Mistral-7B, predicted without a GPU: python -m benchmarks.predict

minorca's own code runs on fake tensors (fake_runs.py), with 2 and 3 layers, from which 32 follow. A kernel's time is
what its bytes or its FLOPs take, whichever is longer, and a constant. Rates are assumptions about an H100, replaced by
those that benchmarks.device and benchmarks.kernels measured where --measured names a folder of their results; what
benchmarks.train_step and benchmarks.decode measured then stands beside the predictions.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import Literal

import torch

from benchmarks.decode import step_bytes
from benchmarks.fake_runs import Training, architecture, decode, train
from minorca.generate.sampling import Sampling
from minorca.model.build import build_model
from minorca.plan.fake_device import unavailable
from minorca.plan.fake_step import PREPARATION, Recording, extrapolated, fake_rows
from minorca.plan.rates import Prediction, Rates, read_result
from minorca.train.metrics import visible_pairs

LAYERS = 32
# of 8,192 tokens: documents' lengths, and the share of each that is trained
BATCHES = {"4,096 tokens a document": ([4096] * 2, 1.0), "packed, 683 a document": ([683] * 11 + [679], 0.5)}
# of 8 pairs: a prompt of 512 tokens and two answers of 256 each
PAIRS = [1024] * 8, 0.5
PROMPT, NEW = 512, 32


def training(
    rates: Rates, name: str, rank: int, dropout: float, backend: str, quantize: Literal["none", "nf4"] = "none"
) -> Prediction:
    """A step of one micro-batch of BATCHES."""
    lengths, trained = BATCHES[name]
    attention = "own" if backend == "own" else "varlen"

    def run(layers: int) -> Recording:
        return train(Training(layers, lengths, trained, rank, dropout, attention=attention, quantize=quantize))

    launches = extrapolated(run, LAYERS)
    launches = Counter({launch: n for launch, n in launches.items() if launch.phase not in PREPARATION})
    arch = architecture(LAYERS)
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    return Prediction(launches, rates, 4.0 * arch.heads * arch.head_dim * pairs, backend)


def preferences(rates: Rates, shared: bool) -> Prediction:
    """A DPO step of PAIRS, with the reference's forward."""
    lengths, trained = PAIRS

    def run(layers: int) -> Recording:
        return train(Training(layers, lengths, trained, objective="dpo", shared=shared))

    launches = extrapolated(run, LAYERS)
    launches = Counter({launch: n for launch, n in launches.items() if launch.phase not in PREPARATION})
    arch = architecture(LAYERS)
    rows = fake_rows(lengths, trained, "dpo")
    prompts = [int(rows.branches(row)[0][0]) for row in range(len(rows))]
    answers = [(length - prompt) // 2 for length, prompt in zip(lengths, prompts)]
    pairs = visible_pairs([prompt + answer for prompt, answer in zip(prompts, answers)] * 2, None)
    if shared:
        pairs -= visible_pairs(prompts, None)
    return Prediction(launches, rates, 4.0 * arch.heads * arch.head_dim * pairs)


def decoding(rates: Rates, batch: int, sampling: Sampling | None = None) -> Prediction:
    """A step of the engine, from its graph."""
    launches = extrapolated(lambda layers: decode(layers, batch, PROMPT, sampling), LAYERS)
    return Prediction(Counter({launch: n for launch, n in launches.items() if launch.captured}), rates)


def of_copy(prediction: Prediction, batch: int) -> float:
    """The share of a copy's rate at which a decoding step reads weights and cache."""
    model = build_model(architecture(LAYERS), torch.bfloat16)
    weights = sum(p.numel() for p in model.parameters()) - model.embedding.weight.numel()
    size = step_bytes(model, weights, batch, PROMPT + NEW / 2)
    return size / prediction.rates.copy / prediction.step_seconds


def _print_step(prediction: Prediction, tokens: int, measured: float | None) -> None:
    """The waterfall from the matrix products to the step; what was measured beside it."""
    seconds = 0.0
    for group, part in prediction.by_group.items():
        if not part:
            continue
        seconds += part
        print(f"  {'+' if seconds > part else ' '} {group:22}{1e3 * part:9.2f} ms{tokens / seconds:12,.0f} tokens/s")
    count = sum(prediction.launches.values())
    bound = "GPU" if prediction.gpu_seconds >= prediction.host_seconds else "host"
    print(f"  {count} launches, {1e3 * prediction.host_seconds:.2f} ms of the host: {bound}-bound")
    if measured:
        step = tokens / prediction.step_seconds
        print(f"  predicted {step:,.0f} tokens/s, measured {measured:,.0f}: {measured / step - 1:+.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.predict", description="Steps of Mistral-7B, predicted without a GPU."
    )
    parser.add_argument(
        "--measured", type=Path, metavar="FOLDER", help="a GPU's results, for rates and to compare with"
    )
    parser.add_argument("--attention", choices=Rates().attention, default="own", help="default: own")
    parser.add_argument("--kernels", type=int, default=0, metavar="N", help="also the N kernels that take longest")
    args = parser.parse_args()
    if reason := unavailable():
        parser.error(reason)
    results = {}
    if args.measured:
        results = {name: read_result(args.measured, name) for name in ("train-full", "decode")}
    results = {name: result for name, result in results.items() if result and result["model"] == "7b"}
    rates = Rates.measured(args.measured) if args.measured else Rates()
    print(f"rates {'of ' + str(args.measured) if args.measured else 'assumed'}: {rates}")
    for name, (lengths, _) in BATCHES.items():
        for rank, dropout in ((16, 0.0), (16, 0.05), (64, 0.0), (64, 0.05)):
            prediction = training(rates, name, rank, dropout, args.attention)
            print(f"\nTraining, {sum(lengths):,} tokens, {name}, rank {rank}, dropout {dropout}, {args.attention}")
            same = name.startswith("packed") and (rank, dropout) == (16, 0.0) and "train-full" in results
            _print_step(prediction, sum(lengths), results["train-full"]["ours"]["tokens_per_second"] if same else None)
            _print_kernels(prediction, args.kernels)
            if (rank, dropout) == (16, 0.0):
                quantized = training(rates, name, rank, dropout, args.attention, "nf4")
                share = quantized.step_seconds / prediction.step_seconds - 1
                print(f"\nThe same with the projections in NF4: {share:+.1%} of the time")
                _print_step(quantized, sum(lengths), None)
                _print_kernels(quantized, args.kernels)
    seconds = {}
    for shared, name in ((True, "prompts shared"), (False, "a prompt for each answer")):
        prediction = preferences(rates, shared)
        seconds[shared] = prediction.step_seconds
        rate = len(PAIRS[0]) / prediction.step_seconds
        print(f"\nDPO, {len(PAIRS[0])} pairs of 512 + 2 x 256 tokens, {name}: {rate:.1f} pairs/s")
        _print_kernels(prediction, args.kernels)
    print(f"sharing takes {seconds[True] / seconds[False]:.0%} of the time")
    measured = {row["batch"]: row["ours"]["tokens_per_second"] for row in results.get("decode", {}).get("decoding", [])}
    for batch in (1, 8, 32):
        prediction = decoding(rates, batch)
        share = of_copy(prediction, batch)
        print(f"\nDecoding, {batch} at once, {PROMPT} + {NEW} tokens, greedy: {share:.0%} of copy bandwidth")
        _print_step(prediction, batch, measured.get(batch))
        _print_kernels(prediction, args.kernels)


def _print_kernels(prediction: Prediction, count: int) -> None:
    for name, launches, seconds in prediction.by_kernel()[:count]:
        print(f"    {name:52}{launches:6}{1e3 * seconds:9.2f} ms")


if __name__ == "__main__":
    main()
