"""`python -m minorca.evaluate`: evaluates a model on tasks of lm_eval (EleutherAI's lm-evaluation-harness), or on the
suites that model cards quote.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minorca import cli, receipts
from minorca.data.chat_template import TEMPLATES, resolve_template
from minorca.data.portable_files import load_chat
from minorca.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from minorca.errors import UserError, raise_problems
from minorca.evaluate import suites
from minorca.files.atomic import check_output, write_file
from minorca.files.hub import name_of, parse_id
from minorca.files.safe_io import cache_directory
from minorca.files.vocabulary import adapted_architecture
from minorca.files.weights import open_model
from minorca.model.architecture import read_architecture
from minorca.model.build import fast_dtype, load_model, prepack
from minorca.model.quantization import parse_quantization
from minorca.train.ranks import World, init_distributed

if TYPE_CHECKING:
    from lm_eval.tasks.manager import TaskDict

    from minorca.evaluate.harness import MinorcaLM
    from minorca.evaluate.mt_bench import MTBench

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
    if args.output:
        cli.outlive_readers()
    with _ranks() as world:
        if world and world.rank:
            logging.disable(logging.CRITICAL)
        _evaluate(args, world)


def build_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="minorca.evaluate", description="Evaluates a model on tasks of lm_eval; results are kept and reused."
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="the model's directory or hub id")
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter in PEFT's format, or its hub id")
    cli.add_quantization(parser, "nf4: quantize the model while it loads, as a QLoRA adapter was trained on it")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of weights and computation; default: bfloat16 where the machine multiplies it"
    )
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--tasks", metavar="A,B", help="names of tasks, groups or tags, or patterns such as 'mmlu_*'")
    chosen.add_argument("--suite", choices=suites.NAMES, help="what model cards quote; seed is all of them")
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
    _add_suite_options(parser)
    cache = parser.add_mutually_exclusive_group()
    cache.add_argument(
        "--cache", type=Path, metavar="DIR", help="keep results there; default: ~/.cache/minorca/results"
    )
    cache.add_argument("--no-cache", action="store_true", help="compute everything, and keep nothing")
    return parser


def _parse(argv: list[str]) -> argparse.Namespace:
    args = build_parser().parse_args(argv)
    raise_problems(_problems(args))
    if args.output:
        beside = [args.output.with_suffix(suffix) for suffix in suites.BESIDE] if args.suite else []
        check_output(args.output, '"minorca": {', beside)
    return args


def _add_suite_options(parser: cli.Parser) -> None:
    group = parser.add_argument_group("suites")
    group.add_argument("--data", type=Path, metavar="DIR", help=f"the tasks' data; default: {suites.DATA}")
    group.add_argument("--name", metavar="NAME", help="the model's in tables and files; default: by its directory")
    group.add_argument("--questions", type=Path, metavar="FILE", help="of MT-Bench: FastChat's question.jsonl")
    group.add_argument(
        "--judge", metavar="URL", help="an OpenAI-compatible endpoint, such as https://api.openai.com/v1"
    )
    group.add_argument("--judge-prompts", type=Path, metavar="FILE", help="FastChat's judge_prompts.jsonl")
    group.add_argument("--judge-model", metavar="NAME", help="what the endpoint calls the judge")
    group.add_argument("--system", metavar="TEXT", help="the system prompt of MT-Bench")


def _suite_problems(args: argparse.Namespace) -> Iterator[UserError]:
    for option in ("num_fewshot", "include_path") if args.suite else ("name", "data"):
        if getattr(args, option) is not None:
            needed = "cannot be combined with --suite" if args.suite else "needs --suite"
            yield UserError(needed, field=f"--{option.replace('_', '-')}")
    judged = suites.has_mt_bench(args.suite)
    for option in ("questions", "judge", "judge_prompts", "judge_model"):
        if judged != (getattr(args, option) is not None):
            message = f"is missing; {args.suite} has MT-Bench" if judged else "needs --suite mt-bench"
            yield UserError(message, field=f"--{option.replace('_', '-')}")
    if args.suite == suites.MT_BENCH:
        for option in ("bos", "slots", "data", "chat", "log_samples"):
            # the last two are flags
            if getattr(args, option) is not (False if option in ("chat", "log_samples") else None):
                yield UserError("has no effect on MT-Bench; leave it out", field=f"--{option.replace('_', '-')}")
    if args.system is not None and not judged:
        yield UserError("needs --suite mt-bench", field="--system")
    if args.suite and args.output and args.output.suffix in suites.BESIDE:
        yield UserError("is where the table or the picture goes; expected another suffix", field="--output")
    if args.name and Path(args.name).name != args.name:
        yield UserError(f"is {args.name}; expected a name without a path", field="--name")


def _problems(args: argparse.Namespace) -> Iterator[UserError]:
    yield from _suite_problems(args)
    if args.num_fewshot is not None and args.num_fewshot < 0:
        yield UserError("must be 0 or more", field="--num-fewshot")
    for option in ("limit", "slots"):
        if (value := getattr(args, option)) is not None and value < 1:
            yield UserError("must be at least 1", field=f"--{option}")
    if args.template and not (args.chat or suites.has_mt_bench(args.suite)):
        yield UserError("needs --chat", field="--template")
    for option, needed in (("fewshot_in_one_turn", "chat"), ("log_samples", "output")):
        if getattr(args, option) and not getattr(args, needed):
            yield UserError(f"needs --{needed}", field=f"--{option.replace('_', '-')}")


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
    from lm_eval.utils import handle_non_serializable

    from minorca.evaluate.mt_bench import MTBench
    from minorca.evaluate.result_cache import identity
    from minorca.evaluate.task_files import load_tasks

    bench = None
    if suites.has_mt_bench(args.suite):
        bench = MTBench.read(args.questions, args.judge, args.judge_prompts, args.judge_model, args.limit)
    tok, template = _read_tokenizer(args, bool(args.chat or bench))
    chosen = None
    if args.tasks:
        chosen = load_tasks(args.tasks.split(","), args.include_path, args.limit, args.num_fewshot)
    prepared = suites.prepare(args.suite, args.data or suites.DATA, args.limit) if args.suite else {}
    of_model: dict[str, object] = {}
    if bench or not args.no_cache:
        quantization = parse_quantization(args.quantize, args.double_quant)
        of_model = identity(args.model, args.adapter, quantization, tok)
    lm = _load(args, world, tok, template, of_model)
    started = time.perf_counter()
    results = _evaluate_tasks(args, world, lm, chosen.manager.load(chosen.tasks)) if chosen else None
    scores = suites.run(prepared, lambda loaded: _evaluate_tasks(args, world, lm, loaded))
    failure = None
    if bench:
        of_bench, failure = _evaluate_mt_bench(args, world, lm, bench, of_model)
        scores += of_bench
    seconds = time.perf_counter() - started
    computed, tokens = lm.counts.computed, lm.counts.tokens
    if world:
        # the first rank draws standard errors, however long
        world.barrier_without_timeout("results")
        computed, tokens = map(int, world.sum([computed, tokens]))
    if world and world.rank:
        return
    ours = {
        "bos": lm.begins_with_bos if lm.counts.requests else None,
        "template": template if args.chat else None,
        "mt_bench": {"template": template, "system": args.system} if bench else None,
        "requests": lm.counts.requests,
        "truncated": lm.counts.truncated,
        "tokens_computed": computed,
        "tokens_shared": tokens - computed,
        "seconds": seconds,
    }
    conditions = _conditions(ours, args, lm)
    if results or scores:
        written = _show_tasks(results, conditions) if results else _show_suites(args, scores, conditions)
        if lm.counts.requests:
            print(_counts(ours, lm.max_length))
        if args.output:
            written |= {"minorca": ours}
            as_json = partial(json.dumps, indent=2, default=handle_non_serializable, ensure_ascii=False)
            written["receipt"] = _receipt(args, lm, json.loads(as_json(written)))
            write_file(args.output, as_json(written) + "\n")
    if failure:
        raise failure


def _read_tokenizer(args: argparse.Namespace, chat: bool) -> tuple[Tokenizer, str | None]:
    """The tokenizer, and the name of the chat template if it is needed."""
    tok = load_tokenizer(args.model)
    arch = read_architecture(args.model)
    check_vocabulary(tok, arch.vocab_size, args.model)
    arch = adapted_architecture(arch, args.adapter)
    tok, recorded = load_chat(tok, arch.vocab_size, args.adapter)
    return tok, resolve_template(tok, args.template or recorded or "auto") if chat else None


def _load(
    args: argparse.Namespace, world: World | None, tok: Tokenizer, template: str | None, of_model: dict[str, object]
) -> "MinorcaLM":
    from minorca.evaluate.harness import MinorcaLM
    from minorca.evaluate.result_cache import ResultCache

    cache = None if args.no_cache else ResultCache(args.cache or cache_directory("results", "--cache"), of_model)
    dtype = DTYPES[args.dtype] if args.dtype else fast_dtype()
    device = world.device if world else None
    model = prepack(load_model(args.model, dtype, device, args.adapter, args.quantize, args.double_quant))
    return MinorcaLM(model, tok, template or "auto", add_bos=args.bos, cache=cache, world=world, slots=args.slots)


def _evaluate_tasks(
    args: argparse.Namespace, world: World | None, lm: "MinorcaLM", loaded: "TaskDict"
) -> dict[str, Any]:
    """lm_eval's results."""
    from minorca.evaluate.harness import evaluate_tasks

    options = {
        "limit": args.limit,
        "log_samples": args.log_samples,
        "apply_chat_template": args.chat,
        "fewshot_as_multiturn": args.chat and not args.fewshot_in_one_turn,
    }
    # standard errors, for which lm_eval may take all cores, are needed once
    if world and world.rank:
        options["bootstrap_iters"] = 0
    return evaluate_tasks(lm, loaded, args.num_fewshot, **options)


def _evaluate_mt_bench(
    args: argparse.Namespace, world: World | None, lm: "MinorcaLM", bench: "MTBench", of_model: dict[str, object]
) -> tuple[list[suites.SuiteResult], UserError | None]:
    """Its scores on the first rank, for which the others wait, or why there are none: other suites have theirs."""
    from minorca.evaluate import mt_bench

    results, failure = [], None
    if not (world and world.rank):
        rendering = [lm.template, lm.tok.chat_template, sorted(lm.tok.stop_ids), args.system]
        settings = [of_model, rendering, str(lm.model.dtype), mt_bench.GENERATION]
        of_answers = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        place = (args.questions.parent, _name(args), of_answers, args.system)
        try:
            results.append(bench.evaluate(lm.model, lm.tok, lm.template, *place))
        except UserError as error:
            failure = error
    if world:
        world.barrier_without_timeout("MT-Bench")
    return results, failure


def _show_tasks(results: dict[str, Any], conditions: str) -> dict[str, Any]:
    """Prints the results of tasks; returns what is written of them."""
    from lm_eval.utils import make_table

    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    print(conditions)
    return {key: results[key] for key in (*WRITTEN, "samples") if key in results}


def _show_suites(args: argparse.Namespace, scores: list[suites.SuiteResult], conditions: str) -> dict[str, Any]:
    """Prints suites' scores beside the published ones, and writes them beside --output; returns what goes there."""
    from minorca.evaluate import report

    print(report.to_markdown(scores, _name(args), conditions))
    if args.output:
        report.write(scores, _name(args), conditions, args.output)
    written: dict[str, Any] = {"suites": report.to_json(scores), "results": {}}
    for result in scores:
        # two suites have the same task with other shots
        prefix = f"{result.suite}/" if args.suite == suites.SEED else ""
        for key in (*WRITTEN, "samples"):
            for task, value in result.evaluated.get(key, {}).items():
                written.setdefault(key, {})[prefix + task] = value
    return written


def _name(args: argparse.Namespace) -> str:
    """What tables and files call the model."""
    adapter = ()
    if args.adapter:
        # of a run's directory, its name and that of the adapter in it
        adapter = (name_of(args.adapter),) if parse_id(args.adapter) else Path(args.adapter).resolve().parts[-2:]
    return args.name or "-".join((name_of(args.model), *adapter))


def _conditions(ours: dict[str, Any], args: argparse.Namespace, lm: "MinorcaLM") -> str:
    """How the model was evaluated, in a line."""
    parts = [str(lm.model.dtype).removeprefix("torch.")]
    if args.quantize != "none":
        parts.append(f"quantized to {args.quantize}")
    if ours["requests"]:
        bos = {True: "with BOS", False: "without BOS", None: "some texts with BOS"}[ours["bos"]]
        parts.append(f"{bos} (as the tokenizer does)" if args.bos is None and not args.chat else bos)
        parts.append(f"chat template {ours['template']}" if args.chat else "no chat template")
    if bench := ours["mt_bench"]:
        system = f"system prompt {bench['system']!r}" if bench["system"] else "no system prompt"
        parts.append(f"MT-Bench: chat template {bench['template']}, {system}")
    return ", ".join(parts)


def _receipt(args: argparse.Namespace, lm: "MinorcaLM", written: dict[str, Any]) -> dict[str, Any]:
    """What the results, as they are going to be written, were computed with, and their digests."""
    quantization = parse_quantization(args.quantize, args.double_quant)
    weights = receipts.of_weights(open_model(args.model, quantization).paths, [args.adapter] if args.adapter else [])
    how = {"dtype": str(lm.model.dtype).removeprefix("torch."), "quantize": args.quantize}
    return receipts.of_scores(written, weights | how)


def _counts(ours: dict[str, Any], max_length: int) -> str:
    lines = [
        f"{ours['requests']} requests in {ours['seconds']:.1f} s, {ours['tokens_computed']} tokens computed, "
        f"{ours['tokens_shared']} shared"
    ]
    if ours["truncated"]:
        lines.append(f"{ours['truncated']} requests were cut on the left, to the model's {max_length} positions")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
