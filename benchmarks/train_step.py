"""One training step of LoRA, minorca beside transformers + PEFT, or with --objective dpo beside TRL:
python -m benchmarks.train_step

A step is forward, backward, clipping and AdamW over the same synthetic rows, which minorca packs into two micro-batches
of at most --tokens tokens. The other side is what a careful user of transformers would write: SDPA, PEFT's fp32
adapters, autocast in bf16 as in its Trainer, fused AdamW, and rows sorted by length and padded to the longest of their
micro-batch, which has at most --tokens tokens, padding included. TRL's DPOTrainer takes four pairs at a time, as in the
known recipe (mlabonne's), and pads them. Both share one copy of the frozen weights and start from the same adapter.
Their first losses must agree, and in fp32 the second. In bf16 these differ: PEFT adds an adapter's output to one that
is rounded already, which loses most of an update as small as the first; minorca adds before it rounds. A side whose
micro-batches do not fit into the GPU's memory halves them.

Rows are packed, and the last part of each is trained; --trained all trains every token that another predicts, as
pretraining and most benchmarks do, and --rows document takes one row of --tokens tokens. --neighbour keeps another
process busy, on a CPU: how threads wait for each other then decides, and torch is loaded here before minorca could set
it (minorca/waiting.py): for what commands do, run this with GOMP_SPINCOUNT=3000.

The sides alternate step by step, and only whole steps are timed: on CUDA the host runs ahead within one. The parts are
those of two more steps, in which the host waits after each. Tokens per second do not count padding. Peak memory is what
CUDA allocated for one side alone, or the resident memory of a process that runs one side alone (Python and its
libraries included).
"""

import argparse
import contextlib
import functools
import itertools
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.common import DEVICE, ROOT, clock, kernel_times, model_under_test, parser, peer, report, spread
from minorca.config import DPOConfig, OptimConfig
from minorca.data.packing import make_batch, plan_epoch
from minorca.data.store import TokenStore
from minorca.model.lora import LoRASettings, adapter_parameters, add_adapters, init_adapters, pad_for_adapters
from minorca.model.network import Mistral
from minorca.train.forward import forward
from minorca.train.metrics import hidden_pairs, peak_flops, peak_memory_bytes, training_flops
from minorca.train.objectives import NextToken
from minorca.train.optim import adamw, clip_gradients
from minorca.train.preference_objective import preference
from minorca.train.reference import Reference
from minorca.waiting import waiting_policy

SETTINGS = LoRASettings(rank=16, alpha=32)
OPTIM = OptimConfig()
# minimum, maximum, and the median and sigma of a log-normal distribution
LENGTHS = {
    "full": (512, 1024, 720, 0.3),
    "short": (16, 200, 60, 0.7),
}
# the same of the prompts and the answers of pairs
PROMPTS, ANSWERS = (32, 400, 160, 0.7), (16, 300, 120, 0.7)
# pairs in a batch of TRL's
PAIRS = 4
# of the losses, relative
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}


def plan(store: TokenStore, tokens: int) -> list[np.ndarray]:
    """The rows of minorca's micro-batches, packed."""
    return list(itertools.chain(*plan_epoch(store.lengths, tokens, 1, packing=True, seed=0, epoch=0)))


def draw_document(vocabulary: int, tokens: int) -> TokenStore:
    """One random row, all of it trained but its first token, as of all rows: nothing predicts it."""
    ids = np.random.default_rng(0).integers(vocabulary, size=tokens, dtype=np.int32)
    return TokenStore(ids, np.arange(tokens) > 0, np.array([0, tokens]))


def draw_rows(kind: str, vocabulary: int, tokens: int, all_trained: bool = False) -> TokenStore:
    """Random rows that fill two micro-batches; all or the last 30 to 70% of each row's tokens are trained."""
    random = np.random.default_rng(0)
    shortest, longest, median, sigma = LENGTHS[kind]
    store = TokenStore(np.empty(0, np.int32), np.empty(0, bool), np.zeros(1, np.int64))
    while True:
        length = int(np.clip(random.lognormal(np.log(median), sigma), shortest, longest))
        ids = random.integers(vocabulary, size=length, dtype=np.int32)
        trained = np.arange(length) >= (1 if all_trained else random.uniform(0.3, 0.7) * length)
        longer = TokenStore(
            np.concatenate([store.tokens, ids]),
            np.concatenate([store.trained, trained]),
            np.append(store.offsets, store.offsets[-1] + length),
        )
        if len(plan(longer, tokens)) > 2:
            return store
        store = longer


def draw_store(args: argparse.Namespace, vocabulary: int) -> TokenStore:
    if args.rows == "document":
        return draw_document(vocabulary, args.tokens)
    return draw_rows(args.rows, vocabulary, args.tokens, args.trained == "all")


def draw_pairs(vocabulary: int, tokens: int) -> TokenStore:
    """Random prompts, each with two random answers, that fill two micro-batches."""
    random = np.random.default_rng(0)

    def length(shortest: int, longest: int, median: int, sigma: float) -> int:
        return int(np.clip(random.lognormal(np.log(median), sigma), shortest, longest))

    def store_of(sizes: list[tuple[int, int, int]]) -> TokenStore:
        lengths = [sum(parts) for parts in sizes]
        return TokenStore(
            np.random.default_rng(1).integers(vocabulary, size=sum(lengths), dtype=np.int32),
            np.concatenate([np.arange(sum(parts)) >= parts[0] for parts in sizes]),
            np.cumsum([0, *lengths]),
            branch_offsets=2 * np.arange(len(sizes) + 1),
            branch_starts=np.array([(parts[0], sum(parts[:2])) for parts in sizes], np.int32).flatten(),
            branch_scores=np.tile(np.array([1, 0], np.float32), len(sizes)),
        )

    sizes: list[tuple[int, int, int]] = []
    while True:
        longer = [*sizes, (length(*PROMPTS), length(*ANSWERS), length(*ANSWERS))]
        if len(plan(store_of(longer), tokens)) > 2:
            return store_of(sizes)
        sizes = longer


class Ours:
    """minorca. `step` is one training step, and yields the name of each part when the part ends."""

    def __init__(
        self, store: TokenStore, model: Mistral, directory: Path, adapter: dict[str, Tensor], objective: str = "sft"
    ):
        self.store = store
        self.model = model.train()
        self.adapters = list(adapter_parameters(model).values())
        reference = Reference(model, self.adapters if objective == "dpo" else [])
        self.objective = preference("dpo", DPOConfig(), reference.of) if objective == "dpo" else NextToken()
        self.counts = self.objective.counts(store, np.arange(len(store)))
        self.optimizer = adamw(self.adapters, OPTIM)

    def arrange(self, tokens: int) -> list[int]:
        """Makes micro-batches of at most `tokens` tokens; returns how many each holds."""
        self.batches = [make_batch(self.store, rows).to(DEVICE) for rows in plan(self.store, tokens)]
        return [len(batch.tokens) for batch in self.batches]

    def step(self) -> Iterator[str]:
        self.loss = torch.zeros((), device=DEVICE)
        for batch in self.batches:
            sums = forward(self.model, batch, self.objective.head(batch))
            loss = self.objective.loss(sums, self.counts)
            self.loss += loss.detach()
            yield "forward"
            loss.backward()
            yield "backward"
        clip_gradients(self.adapters, OPTIM.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        yield "optimizer"


class Theirs:
    """transformers + PEFT, with the methods of `Ours`."""

    def __init__(
        self, store: TokenStore, model: Mistral, directory: Path, adapter: dict[str, Tensor], objective: str = "sft"
    ):
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

        self.store = store
        self.trained = int(store.trained.sum())
        targets = [f"{target}_proj" for target in SETTINGS.targets]
        alpha = int(SETTINGS.alpha)
        config = LoraConfig(r=SETTINGS.rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
        self.model = get_peft_model(peer(directory, model), config).train()
        set_peft_model_state_dict(self.model, adapter)
        self.adapters = [p for p in self.model.parameters() if p.requires_grad]
        half = model.embedding.weight.dtype == torch.bfloat16
        self.precision = torch.autocast(DEVICE.type, torch.bfloat16) if half else contextlib.nullcontext()
        self.optimizer = torch.optim.AdamW(
            self.adapters, OPTIM.lr, OPTIM.betas, OPTIM.eps, OPTIM.weight_decay, fused=True
        )

    def arrange(self, tokens: int) -> list[int]:
        groups: list[list[int]] = [[]]
        for row in np.argsort(-self.store.lengths, kind="stable").tolist():
            if groups[-1] and self.store.lengths[groups[-1][0]] * (len(groups[-1]) + 1) > tokens:
                groups.append([])
            groups[-1].append(row)
        self.batches = [self._padded(rows) for rows in groups]
        return [batch["input_ids"].numel() for batch in self.batches]

    def _padded(self, rows: list[int]) -> dict[str, Tensor]:
        parts = [tuple(map(torch.from_numpy, self.store.row(row))) for row in rows]
        batch = {
            "input_ids": pad_sequence([ids.long() for ids, _ in parts], batch_first=True),
            "attention_mask": pad_sequence(
                [torch.ones(len(ids), dtype=torch.int64) for ids, _ in parts], batch_first=True
            ),
            "labels": pad_sequence(
                [ids.long().where(mask, -100) for ids, mask in parts], batch_first=True, padding_value=-100
            ),
        }
        return {name: tensor.to(DEVICE) for name, tensor in batch.items()}

    def step(self) -> Iterator[str]:
        self.loss = torch.zeros((), device=DEVICE)
        for batch in self.batches:
            with self.precision:
                loss = self.model(**batch, num_items_in_batch=self.trained, use_cache=False).loss
            self.loss += loss.detach()
            yield "forward"
            loss.backward()
            yield "backward"
        torch.nn.utils.clip_grad_norm_(self.adapters, OPTIM.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        yield "optimizer"


class TRL(Theirs):
    """TRL's DPOTrainer on the model of `Theirs`; its reference is the model without the adapter."""

    def __init__(self, *arguments):
        from datasets import Dataset
        from transformers import AutoTokenizer
        from trl.trainer.dpo_config import DPOConfig as Settings
        from trl.trainer.dpo_trainer import DPOTrainer

        super().__init__(*arguments)
        self.first_tokens = 0
        self.directory = tempfile.TemporaryDirectory()
        settings = Settings(
            output_dir=self.directory.name,
            per_device_train_batch_size=PAIRS,
            max_length=None,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=DEVICE.type == "cpu",
            report_to="none",
        )
        # its own tokens are not used, and a trainer needs a row and a tokenizer
        row = Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "model")
        self.trainer = DPOTrainer(model=self.model, args=settings, train_dataset=row, processing_class=tokenizer)

    def arrange(self, tokens: int) -> list[int]:
        # fewer pairs at a time where the first micro-batches did not fit
        self.first_tokens = self.first_tokens or tokens
        size = max(PAIRS * tokens // self.first_tokens, 1)
        self.batches = []
        for first in range(0, len(self.store), size):
            pairs = []
            for row in range(first, min(first + size, len(self.store))):
                parts = np.split(self.store.row(row)[0], self.store.branches(row)[0])
                names = ("prompt_ids", "chosen_ids", "rejected_ids")
                pairs.append({name: part.tolist() for name, part in zip(names, parts)})
            batch = self.trainer.data_collator(pairs)
            self.batches.append({name: tensor.to(DEVICE) for name, tensor in batch.items()})
        return [batch["input_ids"].numel() for batch in self.batches]

    def step(self) -> Iterator[str]:
        self.loss = torch.zeros((), device=DEVICE)
        for batch in self.batches:
            with self.precision:
                share = len(batch["input_ids"]) / 2 / len(self.store)
                loss = self.trainer.compute_loss(self.model, batch) * share
            self.loss += loss.detach()
            yield "forward"
            loss.backward()
            yield "backward"
        torch.nn.utils.clip_grad_norm_(self.adapters, OPTIM.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        yield "optimizer"


SIDES: dict[str, dict[str, type[Ours | Theirs]]] = {
    "sft": {"ours": Ours, "theirs": Theirs},
    "dpo": {"ours": Ours, "theirs": TRL},
}


def whole_step(side: Ours | Theirs) -> float:
    """One step's seconds."""
    start = clock()
    for _ in side.step():
        pass
    return clock() - start


def timed_parts(side: Ours | Theirs) -> dict[str, float]:
    """One step's seconds by part."""
    parts = defaultdict(float)
    start = clock()
    for part in side.step():
        now = clock()
        parts[part] += now - start
        start = now
    return parts


def host_time(side: Ours) -> dict:
    """Of a step whose micro-batches are one short row each, on CUDA: the GPU waits for the host."""
    shortest = make_batch(side.store, np.argsort(side.store.lengths)[:1]).to(DEVICE)
    batches, side.batches = side.batches, [shortest] * len(side.batches)
    seconds = [whole_step(side) for _ in range(5)]
    launches = sum(kernel["launches"] for kernel in kernel_times(functools.partial(whole_step, side)))
    side.batches = batches
    return {"seconds": spread(seconds)["median"], "launches": launches}


@contextlib.contextmanager
def busy_neighbour() -> Iterator[None]:
    """Another process that computes all the time, on one processor, and ends with this one."""
    code = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            yield
        finally:
            process.kill()


def warm_up(side: Ours | Theirs, tokens: int) -> tuple[int, list[int]]:
    """Runs the first step; returns the largest micro-batch that fits, at most `tokens`, and the sizes of all."""
    while True:
        sizes = side.arrange(tokens)
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            whole_step(side)
            return tokens, sizes
        except torch.OutOfMemoryError:
            tokens //= 2
            if tokens < side.store.lengths.max():
                raise
        side.batches = []
        side.optimizer.zero_grad()
        torch.cuda.empty_cache()


def measure(args, names: list[str]) -> dict:
    with model_under_test(args) as (directory, model):
        vocabulary = model.arch.vocab_size
        store = draw_pairs(vocabulary, args.tokens) if args.objective == "dpo" else draw_store(args, vocabulary)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        add_adapters(model, SETTINGS)
        pad_for_adapters(model)
        init_adapters(model, seed=0)
        adapter = {name: p.detach().cpu().clone() for name, p in adapter_parameters(model).items()}
        sides, results = {}, {}
        for name in names:
            # what the previous side keeps
            others = torch.cuda.memory_allocated() - weights if sides else 0
            side = sides[name] = SIDES[args.objective][name](store, model, directory, adapter, args.objective)
            tokens, sizes = warm_up(side, args.tokens)
            results[name] = {
                "micro_batch_tokens": tokens,
                "micro_batches": len(sizes),
                "padding": 1 - len(store.tokens) / sum(sizes),
                "peak_memory_bytes": peak_memory_bytes(DEVICE) - others,
                "losses": [side.loss.item()],
            }
        steps = {name: [] for name in names}
        with busy_neighbour() if args.neighbour else contextlib.nullcontext():
            for _ in range(args.steps):
                for name, side in sides.items():
                    steps[name].append(whole_step(side))
                    results[name]["losses"].append(side.loss.item())
            parts = {name: [timed_parts(side) for _ in range(2)] for name, side in sides.items()}
        if DEVICE.type == "cuda":
            for name, side in sides.items():
                results[name]["kernels"] = kernel_times(functools.partial(whole_step, side))
            results["ours"]["host"] = host_time(sides["ours"])
        hidden = hidden_pairs(store, np.arange(len(store)), model.arch.window)
        counts = sum(map(torch.numel, adapter.values())), store.lengths.tolist(), int(store.trained.sum())
        flops = training_flops(model.arch, *counts, hidden=hidden)
    for name, result in results.items():
        seconds = spread(steps[name])
        peak = peak_flops(DEVICE, getattr(torch, args.dtype))
        result |= {
            "seconds": seconds,
            "parts_seconds": {part: spread([step[part] for step in parts[name]])["median"] for part in parts[name][0]},
            "rows_per_second": len(store) / seconds["median"],
            "tokens_per_second": len(store.tokens) / seconds["median"],
            "trained_tokens_per_second": int(store.trained.sum()) / seconds["median"],
            "mfu": flops / seconds["median"] / peak if peak else None,
        }
    sizes = {
        "documents": len(store),
        "tokens": len(store.tokens),
        "trained_tokens": int(store.trained.sum()),
        "flops": flops,
    }
    return {"step": sizes, **results}


def main() -> None:
    options = parser("benchmarks.train_step", "One LoRA training step, minorca beside transformers + PEFT.")
    options.add_argument("--objective", choices=SIDES, default="sft", help="dpo: random pairs, beside TRL")
    kinds = "full: 512 to 1024 tokens each; short: 16 to 200; document: one row of --tokens tokens, all of them trained"
    options.add_argument("--rows", choices=[*LENGTHS, "document"], default="full", help=kinds)
    options.add_argument(
        "--trained", choices=["part", "all"], default="part", help="the last 30 to 70%% of a row, or all of it"
    )
    options.add_argument("--neighbour", action="store_true", help="beside a process that keeps one processor busy")
    options.add_argument(
        "--steps", type=int, default=5, metavar="N", help="timed steps of each side, after a warm-up step; default: 5"
    )
    options.add_argument(
        "--tokens", type=int, default=2048, metavar="N", help="maximum size of a micro-batch; default: 2048"
    )
    options.add_argument("--only", choices=SIDES["sft"], help="run one side alone and print its peak memory in bytes")
    args = options.parse_args()
    longest = PROMPTS[1] + 2 * ANSWERS[1] if args.objective == "dpo" else LENGTHS.get(args.rows, (0, 1))[1]
    if args.tokens < longest:
        options.error(f"--tokens is {args.tokens}; rows have up to {longest}")
    if args.only:
        args.steps = 1
        print(measure(args, [args.only])[args.only]["peak_memory_bytes"])
        return
    alone = {}
    # the peak of a process includes both sides, so each runs in a process of its own
    if DEVICE.type == "cpu":
        for name in SIDES[args.objective]:
            command = [sys.executable, "-m", "benchmarks.train_step", *sys.argv[1:], "--only", name]
            alone[name] = int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])
    result = measure(args, list(SIDES[args.objective]))
    for name, peak in alone.items():
        result[name]["peak_memory_bytes"] = peak
    rows = "pairs" if args.objective == "dpo" else args.rows
    settings = {"model": args.shape or args.model.name, "rows": rows, "dtype": args.dtype, "tokens": args.tokens}
    ratio = result["ours"]["tokens_per_second"] / result["theirs"]["tokens_per_second"]
    settings |= {"objective": args.objective, "layers": args.layers}
    settings |= {"trained": args.trained, "neighbour": args.neighbour, "waiting": waiting_policy()}
    name = "train-dpo" if args.objective == "dpo" else f"train-{args.rows}"
    name += f"-{args.tokens}" if args.rows == "document" else ""
    name += "-all" if args.trained == "all" else ""
    name += "-beside-a-neighbour" if args.neighbour else ""
    report({**settings, **result, "ratio": ratio}, name, args.output)
    must_agree = 2 if args.dtype == "float32" else 1
    for step, (ours, theirs) in enumerate(zip(*(result[name]["losses"][:2] for name in SIDES[args.objective]))):
        print(f"loss: ours {ours:.6f}, theirs {theirs:.6f}")
        if step < must_agree and not abs(ours - theirs) <= TOLERANCE[args.dtype] * theirs:
            limit = f"{TOLERANCE[args.dtype]:g}, relative"
            sys.exit(f"benchmarks.train_step: error: the losses differ by more than {limit}")


if __name__ == "__main__":
    main()
