"""`python -m minorca.evaluate`: evaluates a model on tasks of lm_eval (EleutherAI's lm-evaluation-harness)."""

import argparse
import contextlib
import importlib.util
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from minorca import cli
from minorca.data.chat_template import TEMPLATES, resolve_template
from minorca.data.portable_files import load_chat
from minorca.data.tokenizer import check_vocabulary, load_tokenizer
from minorca.errors import UserError, raise_problems
from minorca.files.vocabulary import adapted_architecture
from minorca.model.architecture import read_architecture
from minorca.model.build import fast_dtype, load_model, prepack
from minorca.model.quantization import parse_quantization
from minorca.train.ranks import World, init_distributed

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# of lm_eval's results, what is written
WRITTEN = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")
# seconds that a rank may take to answer the others
TIMEOUT = 600


def main(argv: list[str]) -> None:
    args = _parse(argv)
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm_eval is not installed; pip install 'minorca[eval]', or lm_eval==0.4.13")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with _ranks() as world:
        if world and world.rank:
            logging.disable(logging.CRITICAL)
        _evaluate(args, world)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(
        prog="minorca.evaluate", description="Evaluates a model on tasks of lm_eval; results are kept and reused."
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="the model's directory")
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter in PEFT's format")
    cli.add_quantization(parser, "nf4: quantize the model while it loads, as a QLoRA adapter was trained on it")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of weights and computation; default: bfloat16 where the machine multiplies it"
    )
    parser.add_argument(
        "--tasks", required=True, metavar="A,B", help="names of tasks, groups or tags, or patterns such as 'mmlu_*'"
    )
    parser.add_argument("--include-path", type=Path, metavar="DIR", help="a folder with YAML files of your own tasks")
    parser.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples before each question; default: what each task says"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="evaluate the first N rows of each task only")
    parser.add_argument(
        "--bos", action=argparse.BooleanOptionalAction, help="start texts with BOS; default: as the tokenizer does"
    )
    parser.add_argument("--chat", action="store_true", help="ask through the chat template, examples as turns")
    parser.add_argument(
        "--fewshot-in-one-turn", action="store_true", help="with --chat: examples and question in one user message"
    )
    parser.add_argument(
        "--template", choices=TEMPLATES, help="the chat template; default: that of the adapter's training, or auto"
    )
    parser.add_argument(
        "--slots", type=int, metavar="N", help="answers that are generated at once; default: 32 on a GPU, 8 on a CPU"
    )
    parser.add_argument("--log-samples", action="store_true", help="write every question and answer to --output too")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results to FILE, as JSON")
    cache = parser.add_mutually_exclusive_group()
    cache.add_argument(
        "--cache", type=Path, metavar="DIR", help="keep results there; default: ~/.cache/minorca/results"
    )
    cache.add_argument("--no-cache", action="store_true", help="compute everything, and keep nothing")
    args = parser.parse_args(argv)
    raise_problems(_problems(args))
    return args


def _problems(args: argparse.Namespace) -> Iterator[UserError]:
    if args.num_fewshot is not None and args.num_fewshot < 0:
        yield UserError("must be 0 or more", field="--num-fewshot")
    for option in ("limit", "slots"):
        if (value := getattr(args, option)) is not None and value < 1:
            yield UserError("must be at least 1", field=f"--{option}")
    for option, needed in (("fewshot_in_one_turn", "chat"), ("template", "chat"), ("log_samples", "output")):
        if getattr(args, option) and not getattr(args, needed):
            yield UserError(f"needs --{needed}", field=f"--{option.replace('_', '-')}")
    if args.output and not args.output.parent.is_dir():
        yield UserError(f"is in {args.output.parent}, which is not a directory", field="--output")


@contextlib.contextmanager
def _ranks() -> Iterator[World | None]:
    """The ranks that torchrun started; None where it did not."""
    if "RANK" not in os.environ:
        yield None
        return
    with init_distributed(TIMEOUT) as world:
        yield world


def _evaluate(args: argparse.Namespace, world: World | None) -> None:
    # lm_eval takes seconds to import, and may be missing where only the options are read
    import lm_eval
    from lm_eval.utils import handle_non_serializable, make_table

    from minorca.evaluate.harness import MinorcaLM
    from minorca.evaluate.result_cache import ResultCache, default_directory, identity
    from minorca.evaluate.task_files import load_tasks

    tok = load_tokenizer(args.model)
    arch = read_architecture(args.model)
    check_vocabulary(tok, arch.vocab_size, args.model)
    arch = adapted_architecture(arch, args.adapter)
    tok, recorded = load_chat(tok, arch.vocab_size, args.adapter)
    template = resolve_template(tok, args.template or recorded or "auto") if args.chat else None
    tasks, manager = load_tasks(args.tasks.split(","), args.include_path, args.limit, args.num_fewshot)
    cache = None
    if not args.no_cache:
        quantization = parse_quantization(args.quantize, args.double_quant)
        of_model = identity(args.model, args.adapter, quantization, tok)
        cache = ResultCache(args.cache or default_directory(), of_model)
    dtype = DTYPES[args.dtype] if args.dtype else fast_dtype()
    device = world.device if world else None
    model = prepack(load_model(args.model, dtype, device, args.adapter, args.quantize, args.double_quant))
    lm = MinorcaLM(model, tok, template or "auto", add_bos=args.bos, cache=cache, world=world, slots=args.slots)
    started = time.perf_counter()
    # its decorator hides its parameters from type checkers
    simple_evaluate: Any = lm_eval.simple_evaluate
    results: dict[str, Any] | None = simple_evaluate(
        lm,
        tasks=tasks,
        task_manager=manager,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        log_samples=args.log_samples,
        apply_chat_template=args.chat,
        fewshot_as_multiturn=args.chat and not args.fewshot_in_one_turn,
    )
    seconds = time.perf_counter() - started
    computed, tokens = lm.counts.computed, lm.counts.tokens
    if world:
        computed, tokens = map(int, world.sum([computed, tokens]))
    if results is None or (world and world.rank):
        return
    ours = {
        "bos": lm.add_bos,
        "template": template,
        "requests": lm.counts.requests,
        "truncated": lm.counts.truncated,
        "tokens_computed": computed,
        "tokens_shared": tokens - computed,
        "seconds": seconds,
    }
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    print(_summary(ours, args, lm.max_length))
    if args.output:
        written = {key: results[key] for key in (*WRITTEN, "samples") if key in results} | {"minorca": ours}
        _write(args.output, json.dumps(written, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n")


def _summary(ours: dict, args: argparse.Namespace, max_length: int) -> str:
    bos = f"{'with' if ours['bos'] else 'without'} BOS{'' if args.bos is not None else ' (as the tokenizer does)'}"
    chat = f"chat template {ours['template']}" if args.chat else "no chat template"
    lines = [
        f"{bos}, {chat}; {ours['requests']} requests in {ours['seconds']:.1f} s, {ours['tokens_computed']} tokens "
        f"computed, {ours['tokens_shared']} shared"
    ]
    if ours["truncated"]:
        lines.append(f"{ours['truncated']} requests were cut on the left, to the model's {max_length} positions")
    return "\n".join(lines)


def _write(path: Path, text: str) -> None:
    """Writes a file, which is complete or absent."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot be written ({error})", path=path) from None


if __name__ == "__main__":
    cli.run(main)
