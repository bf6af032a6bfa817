"""Do two checkouts of minorca compute the same bits, equally fast?

    python -m benchmarks.compare_trees BEFORE AFTER [--only bits|speed] [--output FOLDER]
    python -m benchmarks.compare_trees BEFORE --save FILE     # only the bits of one checkout
    python -m benchmarks.compare_trees FILE AFTER             # compares with them; on the same machine

Both checkouts are used through their commands and their public Python names alone, so their modules may be arranged
differently. Each runs in processes of its own, with its own code on the path; one virtual environment serves both.

bits: short training runs in each precision, with each activation checkpointing, on one and two ranks; generation and
logits, with and without an adapter; the server's answers; merged weights. A line a check: identical, or what differs
first. The exit status is 1 where anything differs or fails.

speed: a training step, generate(), the server's answers and load_model(). Both checkouts take turns, and a ratio is
that of one turn; the table has the medians. Threads are torch's default, or OMP_NUM_THREADS.

The checkouts are told apart only by their code: both read the same model and the same rows.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib
import itertools
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

ROOT = Path(__file__).parent.parent
DTYPES = ("bfloat16", "float32")

# Prompts of different lengths, whose answers do not stop early.
PROMPTS = (
    "Once upon a time",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,",
    "The history of the lighthouse begins long before electric light. Fires were lit on hills, and later on towers of "
    "stone, so that ships could find their way into the harbour at night. The first of these towers",
)
NEW_TOKENS = 200

# What a line of metrics.jsonl says that does not depend on the machine's speed.
NUMBERS = ("step", "loss", "grad_norm", "lr", "tokens", "trained_tokens", "eval_loss")

# The server chooses bfloat16 where the CPU multiplies it in hardware, which oneDNN can be told that it does not.
SERVED_IN = {"bfloat16": {}, "float32": {"ONEDNN_MAX_CPU_ISA": "AVX2"}}


class Failed(Exception):
    """A command or call of a checkout ended with an error."""


# ------------------------------------------------------------------------------------------------------------ processes


@dataclass
class Tree:
    """A checkout, the model that it runs, and a folder for what it writes.

    Attributes:
        threads: of each process; None: OMP_NUM_THREADS, or torch's default.
    """

    path: Path
    model: Path
    folder: Path
    threads: int | None

    @property
    def environment(self) -> dict[str, str]:
        values = {
            "PYTHONPATH": f"{self.path}:{self.path / 'kernels'}",
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "HF_HUB_OFFLINE": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        if self.threads:
            values["OMP_NUM_THREADS"] = str(self.threads)
        return os.environ | values

    def run(self, *arguments: Any) -> None:
        """Runs Python with these arguments and the checkout's code."""
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, cwd=self.path, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise Failed(f"exit status {done.returncode} of {' '.join(command[1:])}: {done.stderr[-1000:]}")

    def train(self, output: Path, settings: dict[str, Any], ranks: int = 1) -> list[dict[str, Any]]:
        """Trains with these settings; returns the lines of metrics.jsonl."""
        output.parent.mkdir(parents=True, exist_ok=True)
        # What a run without --config starts from is not part of the comparison.
        config = output.with_suffix(".yaml")
        config.write_text("{}")
        settings = settings | {"model.path": self.model, "train.output": output}
        options = [word for key, value in settings.items() for word in (f"--{key}", value)]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        self.run(*launcher, "-m", "minorca.train", "--config", config, *options)
        # They are large and no longer needed.
        shutil.rmtree(output / "checkpoints")
        return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


class Worker:
    """This script in a process of its own with a checkout's code, which answers calls of the functions in CALLS."""

    def __init__(self, tree: Tree):
        # -P: the script's own folder is not on the path.
        command = [sys.executable, "-P", __file__, "--worker", str(tree.path)]
        self.process = subprocess.Popen(
            command, cwd=tree.path, env=tree.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: Any) -> None:
        self.process.terminate()
        self.process.communicate()

    def call(self, name: str, *arguments: Any) -> Any:
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps([name, arguments], default=str), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise Failed(f"{name}{arguments}: see the error above")
        return json.loads(line)


class Server:
    """`minorca.serve` of a checkout."""

    def __init__(self, tree: Tree, dtype: str, adapter: Path | None = None):
        adapters = ["--adapter", f"adapter={adapter}"] if adapter else []
        command = [sys.executable, "-m", "minorca.serve", "--model", str(tree.model), "--port", "0", *adapters]
        self.log = tree.folder / f"serve-{dtype}.log"
        environment = tree.environment | SERVED_IN[dtype]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=tree.path, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def __enter__(self) -> "Server":
        line = self.process.stdout.readline() if self.process.stdout else ""
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        if not found:
            self.__exit__()
            raise Failed(f"the server did not start: {self.log.read_text()[-1000:]}")
        self.address = found[0]
        with urllib.request.urlopen(f"{self.address}/v1/models") as answer:
            self.base = json.load(answer)["data"][0]["id"]
        return self

    def __exit__(self, *error: Any) -> None:
        self.process.terminate()
        self.process.communicate()

    def complete(self, prompts: list[list[int]], **options: Any) -> dict[str, Any]:
        """The answer of /v1/completions, without what is new in each."""
        body = {"model": self.base, "prompt": prompts, "temperature": 0} | options
        call = urllib.request.Request(f"{self.address}/v1/completions", json.dumps(body).encode())
        call.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(call) as answer:
            content = json.load(answer)
        return {"choices": content["choices"], "usage": content["usage"]}


# --------------------------------------------------------------------- what a worker does, with its checkout's minorca


@functools.cache
def loaded(model: str, dtype: str, adapter: str | None = None) -> Any:
    import minorca

    return minorca.load_model(model, dtype=getattr(torch, dtype), device="cpu", adapter=adapter)


def encode(model: str) -> list[list[int]]:
    """The ids of PROMPTS."""
    import minorca

    tok = minorca.load_tokenizer(model)
    return [tok.encode(text) for text in PROMPTS]


@torch.no_grad()
def numbers(model: str, dtype: str, adapter: str | None) -> dict[str, Any]:
    """Greedy and sampled tokens of PROMPTS, the greedy ones' log probabilities, and a hash of all logits."""
    from minorca.generate import generate

    network = loaded(model, dtype, adapter)
    prompts = encode(model)
    greedy = generate(network, prompts, max_new_tokens=NEW_TOKENS)
    sampled = generate(network, prompts, max_new_tokens=32, temperature=0.8, top_p=0.9, top_k=50, seed=1)
    logprobs = []
    logits = []
    for prompt, answer in zip(prompts, greedy):
        logits.append(network(torch.tensor(prompt + answer)))
        chosen = logits[-1][len(prompt) - 1 : -1].float().log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])
        logprobs.append(chosen[:, 0].tolist())
    # All of them once more, end to end as documents of one row.
    documents = [prompt + answer for prompt, answer in zip(prompts, greedy)]
    starts = torch.tensor([0, *itertools.accumulate(map(len, documents))], dtype=torch.int32)
    packed = network(torch.tensor(sum(documents, [])), cu_seqlens=starts)
    return {
        "prompts": prompts,
        "greedy": greedy,
        "logprobs": logprobs,
        "sampled": sampled,
        "logits": [hash_of(tensor) for tensor in logits],
        "packed_logits": hash_of(packed),
    }


def load_seconds(model: str, dtype: str) -> float:
    import minorca

    start = time.perf_counter()
    minorca.load_model(model, dtype=getattr(torch, dtype), device="cpu")
    return time.perf_counter() - start


def generate_seconds(model: str, dtype: str, prompts: list[list[int]], new_tokens: int) -> float:
    from minorca.generate import generate

    network = loaded(model, dtype)
    start = time.perf_counter()
    generate(network, prompts, max_new_tokens=new_tokens)
    return time.perf_counter() - start


def check_modules(tree: Path) -> None:
    """Stops where any of minorca's modules came from elsewhere than the checkout."""
    for package in ("export", "generate", "serve", "train"):
        importlib.import_module(f"minorca.{package}")
    for name, module in sorted(sys.modules.items()):
        origin = getattr(module, "__file__", None)
        if name.startswith("minorca") and origin and not Path(origin).resolve().is_relative_to(tree):
            raise SystemExit(f"{name} is {origin}, which is not in {tree}")


CALLS = {function.__name__: function for function in (encode, numbers, load_seconds, generate_seconds)}


def worker(tree: Path) -> None:
    check_modules(tree)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(json.dumps(CALLS[name](*arguments)), flush=True)


# ----------------------------------------------------------------------------------------------------------------- bits


def hash_of(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def hashes(file: Path) -> dict[str, str]:
    """SHA-256 of each tensor of a safetensors file."""
    with safe_open(file, "pt") as tensors:
        return {name: hash_of(tensors.get_tensor(name)) for name in sorted(tensors.keys())}


def write_short_rows(tree: Tree) -> None:
    """Two hundred rows of examples/data, cut so short that two of them are packed into a micro-batch of 32 tokens."""
    whole = tree.path / "examples" / "data" / "train.jsonl"
    with whole.open() as lines, (tree.folder / "short.jsonl").open("w") as file:
        for line in itertools.islice(lines, 200):
            row = json.loads(line)
            short = {"system_prompt": "", "question": row["question"][:8], "response": row["response"][:8]}
            file.write(json.dumps(short) + "\n")


def trained(tree: Tree, name: str, settings: dict[str, Any], ranks: int) -> dict[str, Any]:
    """The numbers of a run's steps, and the adapter that they give."""
    output = tree.folder / name
    lines = tree.train(output, settings, ranks)
    return {
        "lines": [{key: line[key] for key in NUMBERS if key in line} for line in lines],
        "adapter": hashes(output / "adapter" / "adapter_model.safetensors"),
    }


def training(dtype: str, checkpointing: str, ranks: int, shard: str, tree: Tree) -> dict[str, Any]:
    """Thirty small steps, and an evaluation before and after them."""
    settings = {
        "model.dtype": dtype,
        "lora.dropout": 0.1,
        "data.train": tree.folder / "short.jsonl",
        "data.eval": 0.02,
        "data.template": "chatml",
        "data.seq_len": 32,
        "train.steps": 30,
        # Three micro-batches a step: one of two ranks has none in a step's second round.
        "train.micro_batch_tokens": 32,
        "train.batch_tokens": 96,
        "parallel.activation_checkpointing": checkpointing,
        "parallel.shard": shard,
    }
    return trained(tree, f"{dtype}-{checkpointing}-{ranks}-{shard}", settings, ranks)


def training_on_whole_rows(dtype: str, tree: Tree) -> dict[str, Any]:
    """Three steps as large as the quickstart's micro-batches, with the model's own template."""
    settings = {
        "model.dtype": dtype,
        "data.train": tree.path / "examples" / "data" / "train.jsonl",
        "data.seq_len": 512,
        "train.steps": 3,
        "train.micro_batch_tokens": 1024,
        "train.batch_tokens": 1024,
    }
    return trained(tree, f"{dtype}-whole", settings, ranks=1)


def adapter_of(tree: Tree) -> Path:
    """The adapter that the checks of generation, the server and export use."""
    return tree.folder / "bfloat16-none-1-auto" / "adapter"


def generation(dtype: str, with_adapter: bool, tree: Tree) -> dict[str, Any]:
    with Worker(tree) as process:
        return process.call("numbers", tree.model, dtype, adapter_of(tree) if with_adapter else None)


def answers(dtype: str, tree: Tree) -> dict[str, Any]:
    """The server's greedy and sampled answers, with log probabilities, of the base model and of the adapter."""
    with Worker(tree) as process:
        prompts = process.call("encode", tree.model)
    sampling = {"temperature": 0.8, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "seed": 1, "n": 2}
    with Server(tree, dtype, adapter_of(tree)) as server:
        return {
            "greedy": server.complete(prompts, max_tokens=NEW_TOKENS, logprobs=1),
            "adapter": server.complete(prompts, max_tokens=NEW_TOKENS, logprobs=1, model="adapter"),
            "sampled": server.complete(prompts[:1], max_tokens=32, logprobs=1, **sampling),
        }


def export(tree: Tree) -> dict[str, Any]:
    """Merged weights: each tensor, and each file."""
    output = tree.folder / "merged"
    tree.run("-m", "minorca.export", "--model", tree.model, "--adapter", adapter_of(tree), "--output", output)
    files = sorted(output.glob("*.safetensors"))
    return {
        "tensors": [hashes(file) for file in files],
        "files": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
    }


Checks = dict[str, Callable[[Tree], dict[str, Any]]]


def checks_of_bits() -> list[tuple[int, Checks]]:
    """Groups of checks by name, and how many of a group run at once on two cores: a process has one thread."""
    single: Checks = {}
    double: Checks = {}
    for dtype, checkpointing in itertools.product(DTYPES, ("none", "selective", "full")):
        name = f"training, {dtype}, checkpointing {checkpointing}"
        single[f"{name}, 1 rank"] = functools.partial(training, dtype, checkpointing, 1, "auto")
        double[f"{name}, 2 ranks"] = functools.partial(training, dtype, checkpointing, 2, "auto")
    for dtype in DTYPES:
        single[f"training, {dtype}, whole rows, 1 rank"] = functools.partial(training_on_whole_rows, dtype)
    double["training, bfloat16, checkpointing selective, 2 ranks, fsdp"] = functools.partial(
        training, "bfloat16", "selective", 2, "fsdp"
    )
    others: Checks = {}
    for dtype in DTYPES:
        others[f"generate() and logits, {dtype}"] = functools.partial(generation, dtype, False)
        others[f"generate() and logits, {dtype}, adapter"] = functools.partial(generation, dtype, True)
        others[f"server, {dtype}"] = functools.partial(answers, dtype)
    others["export"] = export
    return [(2, single), (1, double), (2, others)]


def attempt(check: Callable[[Tree], dict[str, Any]], tree: Tree) -> dict[str, Any]:
    try:
        return check(tree)
    except (Failed, OSError) as error:
        return {"failed": str(error)}


def first_difference(before: Any, after: Any, where: str = "") -> str | None:
    """Where two JSON values differ first, and how."""
    if isinstance(before, dict) and isinstance(after, dict):
        pairs = [(f"{where}.{key}", before.get(key), after.get(key)) for key in before | after]
    elif isinstance(before, list) and isinstance(after, list):
        pairs = [(f"{where}[{n}]", *pair) for n, pair in enumerate(itertools.zip_longest(before, after))]
    else:
        return None if before == after else f"{where.lstrip('.')}: {before} before, {after} after"
    differences = (first_difference(one, other, place) for place, one, other in pairs)
    return next(filter(None, differences), None)


def compare_bits(trees: list[Tree], saved: dict[str, Any] | None) -> tuple[dict[str, str], dict[str, Any]]:
    """Runs all checks; returns what is said of each, and what the first tree computed.

    Args:
        trees: one or two.
        saved: by check, what to compare with where there is one tree; without it, nothing is compared.
    """
    said = {}
    computed = {}
    for tree in trees:
        write_short_rows(tree)
    for at_once, checks in checks_of_bits():
        with ThreadPoolExecutor(at_once) as pool:
            running = {name: [pool.submit(attempt, check, tree) for tree in trees] for name, check in checks.items()}
            for name, futures in running.items():
                values = [future.result() for future in futures]
                computed[name] = values[0]
                if saved:
                    values.insert(0, saved.get(name, {}))
                failures = [value["failed"] for value in values if "failed" in value]
                difference = first_difference(values[0], values[-1])
                if failures:
                    said[name] = f"FAILED: {failures[0]}"
                elif difference:
                    said[name] = f"DIFFERS: {difference}"
                else:
                    said[name] = "identical" if len(values) > 1 else "computed"
                print(f"{name}: {said[name]}", flush=True)
    return said, computed


# ---------------------------------------------------------------------------------------------------------------- speed


def step_seconds(tree: Tree, dtype: str, turn: Iterator[int]) -> float:
    """The median step of a short run, its first three steps left out."""
    settings = {
        "model.dtype": dtype,
        "data.train": tree.path / "examples" / "data" / "train.jsonl",
        "data.seq_len": 256,
        "train.micro_batch_tokens": 256,
        "train.batch_tokens": 512,
        "train.steps": 12,
    }
    lines = tree.train(tree.folder / f"{dtype}-{next(turn)}", settings)
    return statistics.median(line["seconds"] for line in lines[3:])


def served_seconds(server: Server, prompts: list[list[int]], new_tokens: int) -> float:
    start = time.perf_counter()
    answer = server.complete(prompts, max_tokens=new_tokens)
    seconds = time.perf_counter() - start
    if answer["usage"]["completion_tokens"] != len(prompts) * new_tokens:
        raise Failed("an answer of the server stopped early, so that its time tells little; choose other prompts")
    return seconds


def take_turns(what: str, rounds: int, sides: list[Callable[[], float]]) -> dict[str, Any]:
    """Times both sides, once a round; the one that begins alternates."""
    seconds: list[list[float]] = [[], []]
    for n in range(rounds):
        for side in (0, 1) if n % 2 == 0 else (1, 0):
            seconds[side].append(sides[side]())
    ratios = [after / before for before, after in zip(*seconds)]
    ratio = statistics.median(ratios)
    result = {
        "what": what,
        "before": statistics.median(seconds[0]),
        "after": statistics.median(seconds[1]),
        "ratio": ratio,
        "min": min(ratios),
        "max": max(ratios),
        "within_2_percent": abs(ratio - 1) <= 0.02,
        "seconds": seconds,
    }
    verdict = "yes" if result["within_2_percent"] else f"no, {'slower' if ratio > 1 else 'faster'}"
    cells = [what, *(f"{result[key]:.4f}" for key in ("before", "after", "ratio", "min", "max")), verdict]
    print(f"| {' | '.join(cells)} |", flush=True)
    return result


def compare_speed(trees: list[Tree], rounds: int) -> list[dict[str, Any]]:
    """Times both trees in turns; prints and returns the rows of a table."""
    print("| seconds of | before | after | ratio | min | max | within 2% |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    results = []

    def row(what: str, rounds: int, function: Callable[..., float], sides: list[Any], *arguments: Any) -> None:
        bound = [functools.partial(function, side, *arguments) for side in sides]
        results.append(take_turns(what, rounds, bound))

    turn = itertools.count()
    draw = random.Random(0)
    prompts = [[draw.randrange(100, 10000) for _ in range(32)] for _ in range(8)]
    model = trees[0].model
    for dtype in DTYPES:
        row(f"training step, {dtype}", rounds, step_seconds, trees, dtype, turn)
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(tree)) for tree in trees]
        for dtype in DTYPES:
            for process in workers:
                process.call("load_seconds", model, dtype)
            row(f"load_model(), {dtype}", 4 * rounds, Worker.call, workers, "load_seconds", model, dtype)
            for batch in (1, 8):
                call = ("generate_seconds", model, dtype, prompts[:batch])
                # The first call loads the model.
                for process in workers:
                    process.call(*call, 8)
                row(f"generate(), {dtype}, {batch} x 64 tokens", 2 * rounds, Worker.call, workers, *call, 64)
    for dtype in DTYPES:
        with contextlib.ExitStack() as stack:
            servers = [stack.enter_context(Server(tree, dtype)) for tree in trees]
            for batch in (1, 8):
                for server in servers:
                    server.complete(prompts[:batch], max_tokens=8)
                what = f"server, {dtype}, {batch} x 64 tokens"
                row(what, 2 * rounds, served_seconds, servers, prompts[:batch], 64)
    return results


# -------------------------------------------------------------------------------------------------------------- command


def machine() -> dict[str, str]:
    """What saved bits depend on besides the code."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {"cpu": cpu[1] if cpu else platform.machine(), "torch": torch.__version__}


def commit(tree: Path) -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True).stdout.strip()


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n")


def main() -> int:
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.compare_trees", description=(__doc__ or "").partition("\n")[0]
    )
    options.add_argument("before", type=Path, metavar="BEFORE", help="a checkout, or a file that --save wrote")
    options.add_argument("after", type=Path, nargs="?", metavar="AFTER", help="a checkout; left out with --save")
    options.add_argument("--only", choices=("bits", "speed"), help="default: both")
    options.add_argument("--model", type=Path, default=ROOT / "examples" / "model", metavar="DIR")
    options.add_argument("--rounds", type=int, default=4, metavar="N", help="of training runs; of shorter things, more")
    options.add_argument("--save", type=Path, metavar="FILE", help="write what BEFORE computes, to compare with later")
    options.add_argument("--output", type=Path, metavar="FOLDER", help="write all results there as JSON")
    args = options.parse_args()
    paths = [path.resolve() for path in (args.before, args.after) if path and not path.is_file()]
    for path in paths:
        if not (path / "minorca").is_dir():
            options.error(f"{path}: neither a checkout of minorca nor a file")
    if len(paths) < 2 and args.only == "speed":
        options.error("speed needs two checkouts")
    if args.save and args.before.is_file():
        options.error("--save writes what a checkout computes, and BEFORE is a file")
    if not (args.after or args.save):
        options.error("give AFTER, or --save FILE")

    saved = json.loads(args.before.read_text()) if args.before.is_file() else None
    if saved and saved["machine"] != machine():
        options.error(f"{args.before} is of another machine, {saved['machine']}; this one is {machine()}")
    result: dict[str, Any] = {"machine": machine(), "trees": {str(path): commit(path) for path in paths}}
    said: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:

        def trees(part: str, threads: int | None) -> list[Tree]:
            folders = [Path(folder, part, str(n)) for n in range(len(paths))]
            for path in folders:
                path.mkdir(parents=True)
            return [Tree(path, args.model.resolve(), own, threads) for path, own in zip(paths, folders)]

        if args.only != "speed":
            said, computed = compare_bits(trees("bits", threads=1), saved and saved["checks"])
            result["bits"] = said
            if args.save:
                write_json(args.save, result | {"checks": computed})
        if args.only != "bits" and len(paths) == 2:
            result["speed"] = compare_speed(trees("speed", threads=None), args.rounds)
    if args.output:
        write_json(args.output / "compare-trees.json", result)
    return 0 if all(verdict in ("identical", "computed") for verdict in said.values()) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]))
    else:
        sys.exit(main())
