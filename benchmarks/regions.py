"""What a CPU is given to do, counted: python -m benchmarks.regions [--tokens N]

A LoRA step on one document of --tokens tokens, all of them trained, a prompt of as many, and what generates one more
token for one and for eight sequences: minorca beside transformers + PEFT. Counted are

- parallel regions: operations, or parts of them, that all threads begin and end together. At the end of each they wait
  for one another, and for one that has lost its processor. OpenMP's entry point is wrapped to count them, by a library
  that a C compiler makes: there must be one.
- matrix products, and their operations, 2 M N K each.
- bytes of the tensors that operators other than views are given: what they read or write in place.

Counts do not depend on how busy the machine is.
"""

import argparse
import ctypes
import functools
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import model_under_test, parser, peer, report
from benchmarks.decode import our_run, random_prompts, their_run
from benchmarks.train_step import SETTINGS, SIDES, draw_document
from minorca.model.build import prepack
from minorca.model.lora import adapter_parameters, add_adapters, init_adapters
from minorca.model.network import Mistral

LIBRARY = "MINORCA_REGIONS"
# A region inside another one is run by one thread.
SOURCE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
typedef void parallel(void (*)(void *), void *, unsigned, unsigned);
static atomic_long count;
long regions(void) { return count; }
void GOMP_parallel(void (*function)(void *), void *data, unsigned threads, unsigned flags) {
  int (*in_parallel)(void) = (int (*)(void))dlsym(RTLD_NEXT, "omp_in_parallel");
  if (threads != 1 && !in_parallel()) count++;
  ((parallel *)dlsym(RTLD_NEXT, "GOMP_parallel"))(function, data, threads, flags);
}
"""
# those of lists, which cat takes, are not known
BYTES = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "long int": 8, "int": 4, "bool": 1}
PRODUCTS = re.compile(r"(aten::(mm|bmm|addmm_?|baddbmm)|mkldnn::_linear_pointwise)$")
# and others that touch no numbers
VIEWS = re.compile(
    r"aten::(as_strided|empty.*|resize_|resolve_.*|.*view|slice|transpose|permute|expand|select|split.*|unbind|t|detach|"
    r"alias|unsqueeze|squeeze|narrow|chunk|unflatten)$"
)
# of an answer; minorca's measure of a step begins after some
TOKENS = 8


def count(start: Callable[[], Iterator[str]]) -> dict[str, Counter]:
    """Runs an iterator that yields the name of each part of the work when the part ends, and counts what each does."""
    library = ctypes.CDLL(os.environ[LIBRARY])
    # torch and oneDNN prepare what a first call needs
    list(start())
    counts: dict[str, Counter] = {}
    before = library.regions()
    for part in start():
        counts.setdefault(part, Counter())["regions"] += library.regions() - before
        before = library.regions()
    iterator = start()
    while True:
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            part = next(iterator, None)
        if part is None:
            return counts
        for event in _operators(profiler):
            if PRODUCTS.search(event.name()):
                counts[part].update(products=1, flops=_flops(event))
            sizes = [prod(shape) * BYTES.get(dtype, 0) for shape, dtype in zip(event.shapes(), event.dtypes()) if shape]
            counts[part]["bytes"] += sum(sizes)


def _flops(product: Any) -> int:
    """The operations of a product's event."""
    matrices = [shape for shape in product.shapes() if len(shape) >= 2]
    # where there is something to add, the factors come after it; where there is an output, before it
    left, right = matrices[-2:] if "add" in product.name() else matrices[:2]
    # a layer's weight is [N, K]
    columns = right[0] if "linear" in product.name() else right[-1]
    return 2 * prod(left) * columns


def _operators(profiler: profile) -> Iterator[Any]:
    """Operators that call no others; without views."""
    results = profiler.profiler and profiler.profiler.kineto_results
    events = [event for event in results.events() if "::" in event.name()] if results else []
    events = [event for event in events if not VIEWS.search(event.name())]
    events.sort(key=lambda event: (event.start_thread_id(), event.start_ns(), -event.duration_ns()))
    for event, following in zip(events, [*events[1:], None]):
        end = event.start_ns() + event.duration_ns()
        calls = following and following.start_thread_id() == event.start_thread_id() and following.start_ns() < end
        if not calls:
            yield event


def generation(run: Callable[[Tensor, int], object], args: argparse.Namespace, model: Mistral) -> dict[str, Counter]:
    """What one more token of one and of eight sequences takes, and a prompt; `run` continues prompts by some tokens."""

    def parts(prompts: Tensor) -> Iterator[str]:
        for tokens in (TOKENS, 2 * TOKENS):
            run(prompts, tokens)
            yield str(tokens)

    def of_token(batch: int) -> Counter:
        few, more = count(functools.partial(parts, random_prompts(model, batch, 32))).values()
        return Counter({name: (more[name] - few[name]) // TOKENS for name in more})

    one = of_token(1)
    prompt = count(functools.partial(parts, random_prompts(model, 1, args.tokens)))[str(TOKENS)]
    # the prompt gives the first token
    counts = {"prompt": Counter({name: prompt[name] - (TOKENS - 1) * one[name] for name in prompt})}
    return counts | {"token of 1": one, "token of 8": of_token(8)}


def measure(args: argparse.Namespace) -> dict[str, dict[str, Counter]]:
    with model_under_test(args) as (directory, model):
        theirs: Any = peer(directory, model)
        theirs.generation_config.eos_token_id = None
        counts = {"theirs": generation(functools.partial(their_run, theirs), args, model)}

        def run(prompts: Tensor, tokens: int) -> object:
            return our_run(prepack(model, len(prompts)), prompts, tokens)

        counts = {"ours": generation(run, args, model)} | counts
    with model_under_test(args) as (directory, model):
        store = draw_document(model.arch.vocab_size, args.tokens)
        add_adapters(model, SETTINGS)
        init_adapters(model, seed=0)
        adapter = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
        for name, of_side in SIDES["sft"].items():
            side = of_side(store, model, directory, adapter)
            side.arrange(args.tokens)
            counts[name] |= count(side.step)
    return counts


def main() -> None:
    options = parser("benchmarks.regions", "What a step, a prompt and a generated token give a CPU to do.")
    options.add_argument("--tokens", type=int, default=1024, metavar="N", help="of the document; default: 1024")
    args = options.parse_args()
    if LIBRARY not in os.environ:
        with tempfile.TemporaryDirectory() as directory:
            source, library = Path(directory, "regions.c"), Path(directory, "regions.so")
            source.write_text(SOURCE)
            subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl"], check=True)
            # with one thread there is no region
            environment = {"OMP_NUM_THREADS": "2"} | os.environ | {"LD_PRELOAD": str(library), LIBRARY: str(library)}
            command = [sys.executable, "-m", "benchmarks.regions", *sys.argv[1:]]
            sys.exit(subprocess.run(command, env=environment).returncode)
    counts = measure(args)
    settings = {"model": args.shape or args.model.name, "dtype": args.dtype, "tokens": args.tokens}
    report({**settings, **counts}, f"regions-{args.tokens}", args.output)
    print(f"{'':14}{'':8}{'regions':>9}{'products':>9}{'GFLOP':>9}{'GB':>9}")
    for part in counts["ours"]:
        for name in counts:
            of = counts[name][part]
            numbers = f"{of['regions']:9}{of['products']:9}{of['flops'] / 1e9:9.1f}{of['bytes'] / 1e9:9.2f}"
            print(f"{part:14}{name:8}{numbers}")


if __name__ == "__main__":
    main()
