"""Greedy decoding on a CPU, minorca beside llama.cpp: python -m benchmarks.llama_cpp

llama.cpp is that of npm's node-llama-cpp, which is installed once into build/node-llama-cpp; it runs as a process of
its own (llama_cpp.mjs) with as many threads, on files that minorca exports. Both continue the same random prompts. A
step's time is as in benchmarks.decode; rounds alternate. With `--quantize nf4` minorca's weights have 4 bits too.
"""

import contextlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

# before torch, whose threads it tells how to wait
import minorca  # noqa: F401  # isort: skip

import torch

from benchmarks.common import ROOT, parser, report, spread, write_config
from benchmarks.decode import ROUNDS, limit, our_run, random_prompts, step_seconds
from minorca.export.gguf import export_gguf
from minorca.model.build import load_model, prepack

HOME = ROOT / "build" / "node-llama-cpp"
PACKAGES = [f"{name}@3.22.1" for name in ("node-llama-cpp", "@node-llama-cpp/linux-x64")]


def install(home: Path) -> None:
    """node-llama-cpp and its binaries, unless they are there."""
    if not (home / "node_modules" / "@node-llama-cpp").exists():
        home.mkdir(parents=True, exist_ok=True)
        (home / "package.json").write_text('{"private": true}')
        command = ["npm", "install", "--ignore-scripts", "--omit=optional", *PACKAGES]
        subprocess.run(command, cwd=home, check=True, stdout=subprocess.DEVNULL)


class LlamaCpp:
    """A process that has loaded a file."""

    def __init__(self, path: Path):
        command = ["node", "llama_cpp.mjs", str(path), str(torch.get_num_threads())]
        self.process = subprocess.Popen(command, cwd=HOME, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, prompts: torch.Tensor, new: int) -> tuple[list[list[int]], float]:
        """The new ids of each prompt, and a decoding step's mean seconds."""
        assert self.process.stdin and self.process.stdout
        print(json.dumps({"prompts": prompts.tolist(), "count": new}), file=self.process.stdin, flush=True)
        ids, times = zip(*json.loads(self.process.stdout.readline()))
        # of all sequences together, as ours
        return list(ids), step_seconds(list(enumerate(map(max, zip(*times))))[2 : new - 1])


@contextlib.contextmanager
def model_directory(args) -> Iterator[Path]:
    """--model, or one of random weights of --shape with a tokenizer of as many ids."""
    if not args.shape:
        yield args.model
        return
    import mistral_common
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as directory:
        write_config(args, directory)
        config = AutoConfig.from_pretrained(directory)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
        data = Path(mistral_common.__file__).parent / "data"
        shutil.copy(data / "mistral_instruct_tokenizer_240323.model.v3", Path(directory, "tokenizer.model"))
        yield Path(directory)


def main() -> None:
    options = parser("benchmarks.llama_cpp", "Greedy decoding on a CPU, minorca beside llama.cpp.")
    options.add_argument("--quantize", choices=("none", "nf4"), default="none", help="minorca's weights")
    options.add_argument("--types", default="bf16,f16,q4_0", metavar="T,T", help="of its files; default: bf16,f16,q4_0")
    options.add_argument("--batch", default="1,8", metavar="N,N", help="sequences at once; default: 1,8")
    options.add_argument("--prompt-tokens", type=int, default=32, metavar="N", help="default: 32")
    options.add_argument("--new-tokens", type=int, default=64, metavar="N", help="default: 64")
    args = options.parse_args()
    install(HOME)
    shutil.copy(ROOT / "benchmarks" / "llama_cpp.mjs", HOME)
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(model_directory(args))
        files = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        peers = {}
        for kind in args.types.split(","):
            export_gguf(source, None, files / kind, kind)
            peers[kind] = LlamaCpp(files / kind / f"model-{kind.upper()}.gguf")
            stack.callback(peers[kind].process.kill)
        model = load_model(source, getattr(torch, args.dtype), torch.device("cpu"), quantize=args.quantize)
        # for one sequence many weights keep their layout
        batches = sorted(map(int, args.batch.split(",")))
        runs = [compared(prepack(model, batch), peers, batch, args) for batch in batches]
    settings = {
        "model": args.shape or args.model.name,
        "layers": args.layers,
        "dtype": args.dtype,
        "quantize": args.quantize,
    }
    report({**settings, "packages": PACKAGES, "decoding": runs}, "llama_cpp", args.output)


def compared(model, peers: dict[str, LlamaCpp], batch: int, args) -> dict:
    prompts = random_prompts(model, batch, args.prompt_tokens)
    seconds = {name: [] for name in ("ours", "limit", *peers)}
    expected, _ = our_run(model, prompts, args.new_tokens)
    same = {}
    for name, peer in peers.items():
        pairs = [pair for ids in zip(expected, peer.run(prompts, args.new_tokens)[0]) for pair in zip(*ids)]
        same[name] = sum(one == other for one, other in pairs) / len(pairs)
    for _ in range(ROUNDS):
        seconds["ours"].append(our_run(model, prompts, args.new_tokens)[1])
        seconds["limit"].append(limit(model, batch, args.new_tokens // 2))
        for name, peer in peers.items():
            seconds[name].append(peer.run(prompts, args.new_tokens)[1])
    steps = {name: spread(values) for name, values in seconds.items()}
    ratios = {name: steps[name]["median"] / steps["ours"]["median"] for name in peers}
    return {"batch": batch, "step_seconds": steps, "same_ids": same, "ratios": ratios}


if __name__ == "__main__":
    main()
