"""Text from a model: `generate` for programs, `python -m minorca.generate` for people."""

import contextlib
import json
import re
import time
from collections.abc import Collection, Iterator

from minorca import cli
from minorca.architecture import read_architecture
from minorca.chat import TEMPLATES, render_chat
from minorca.engine import Engine, Request, check, longest, open_engine
from minorca.errors import UserError, refuse
from minorca.model import Mistral
from minorca.sampling import Sampling
from minorca.talk import talk
from minorca.text_stream import TextStream
from minorca.tokenizer import check_vocabulary, load_tokenizer

ROWS = 32  # answers that grow together, at most
NEW_TOKENS = 512  # of an answer, at most, where nothing is said


def generate(
    model: Mistral,
    prompts: list[list[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop_ids: Collection[int] = (),
    seed: int | None = None,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> list[list[int]]:
    """Continues prompts of any lengths together; returns the new ids of each, up to and with its first stop id.

    Equal prompts get different draws, and are read once. On a CPU `prepack(model)` (prepack.py) makes it faster.

    Raises:
        ValueError: a prompt without tokens.
        UserError: an id that the model does not have, or a setting that makes no sense.
    """
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one token")
    sampling = Sampling(temperature, top_p, top_k, min_p, repetition_penalty, seed)
    requests = [Request(prompt, max_new_tokens, sampling, stop_ids, sample=n) for n, prompt in enumerate(prompts)]
    engine = Engine(model, min(len(prompts), ROWS), max(map(len, prompts)) + max_new_tokens)
    for request in requests:
        engine.add(request)
    outs: dict[Request, list[int]] = {request: [] for request in requests}
    while engine.busy:
        for token in engine.step():
            outs[token.request].append(token.id)
    return list(outs.values())


def _parser() -> cli.Parser:
    parser = cli.Parser(prog="minorca.generate", description="Generates text; temperature 0, the default, is greedy.")
    parser.add_argument("--model", required=True, metavar="DIR", help="a model's directory")
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter in PEFT's format")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="one user turn, or the bare text with --raw")
    what.add_argument("--chat", action="store_true", help="a conversation in the terminal; /help tells its commands")
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    parser.add_argument("--template", default="auto", choices=TEMPLATES, help="as data.template when the adapter was trained")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help=f"default: {NEW_TOKENS}, or what the model has left")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X")
    parser.add_argument("--top-k", type=int, default=0, metavar="N")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="X")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")
    parser.add_argument("--seed", type=int, metavar="N", help="of the sampling; without one, every run differs")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of streaming text")
    return parser


def _check(args) -> None:
    problems = {
        "--max-new-tokens must be at least 1": args.max_new_tokens is not None and args.max_new_tokens < 1,
        "--raw takes no --system": args.raw and args.system is not None,
        "--chat takes none of --raw, --json and --stop": args.chat and (args.raw or args.json or args.stop),
        "--stop must not be empty": "" in args.stop,
    }
    refuse(problems)


@contextlib.contextmanager
def _by_option() -> Iterator[None]:
    """What is said of a field is said of the option that sets it."""
    try:
        yield
    except UserError as error:
        fields = r"\b(prompt|max_new_tokens|temperature|top_p|top_k|min_p|repetition_penalty)(?= must| is)"
        raise UserError(re.sub(fields, lambda match: "--" + match[0].replace("_", "-"), str(error))) from None


def main(argv: list[str]) -> None:
    args = _parser().parse_args(argv)
    _check(args)
    with _by_option():
        sampling = Sampling(args.temperature, args.top_p, args.top_k, args.min_p, args.repetition_penalty, args.seed)
    tok, arch = load_tokenizer(args.model), read_architecture(args.model)
    check_vocabulary(tok, arch.vocab_size, args.model)
    adapters = {"adapter": args.adapter} if args.adapter else {}

    def request(ids: list[int]) -> Request:
        new = args.max_new_tokens or max(1, min(NEW_TOKENS, longest(arch) - len(ids)))
        return Request(ids, new, sampling, tok.stop_ids, next(iter(adapters), None))

    if args.chat:
        engine = open_engine(args.model, adapters, slots=1, reuse=True)
        return talk(lambda ids: (token.id for token in engine.answer(request(ids))), tok, args.template, args.system)

    messages = [{"role": "system", "content": args.system}] if args.system else []
    prompt = tok.encode(args.prompt, bos=tok.adds_bos) if args.raw else render_chat(
        tok, [*messages, {"role": "user", "content": args.prompt}], template=args.template
    )
    with _by_option():  # before seconds or minutes of loading
        check(request(prompt), arch.vocab_size, longest(arch), adapters)
    engine = open_engine(args.model, adapters, slots=1)
    stream, ids, started = TextStream(tok, args.stop), [], time.perf_counter()
    show = (lambda text: None) if args.json else (lambda text: print(text, end="", flush=True))
    for token in engine.answer(request(prompt)):
        ids.append(token.id)
        show(stream.push(token.id))
        if stream.stopped:
            break
    show(stream.finish())
    seconds = time.perf_counter() - started
    if not args.json:
        return print()
    reason = "stop" if stream.stopped else token.finish_reason
    numbers = {"tokens": len(ids), "prompt_tokens": len(prompt), "finish_reason": reason, "tokens_per_second": len(ids) / seconds}
    print(json.dumps({"text": stream.text} | numbers, ensure_ascii=False))


if __name__ == "__main__":
    cli.run(main)
