"""`python -m minorca.generate`: text from a model."""

import contextlib
import json
import time
from collections.abc import Iterator

from minorca import cli
from minorca.data.chat_template import TEMPLATES, render_chat
from minorca.data.tokenizer import check_vocabulary, load_tokenizer
from minorca.errors import UserError, raise_problems
from minorca.generate.engine import Request, check, longest, open_engine
from minorca.generate.sampling import Sampling
from minorca.generate.terminal_chat import talk
from minorca.generate.text_stream import TextStream
from minorca.model.architecture import read_architecture

NEW_TOKENS = 512  # of an answer, at most, where nothing is said


def _parser() -> cli.Parser:
    parser = cli.Parser(prog="minorca.generate", description="Generates text; temperature 0, the default, is greedy.")
    parser.add_argument("--model", required=True, metavar="DIR", help="a model's directory")
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter in PEFT's format")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="one user turn, or the bare text with --raw")
    what.add_argument("--chat", action="store_true", help="a conversation in the terminal; /help tells its commands")
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    parser.add_argument(
        "--template", default="auto", choices=TEMPLATES, help="as data.template when the adapter was trained"
    )
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help=f"default: {NEW_TOKENS}, or what the model has left"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X")
    parser.add_argument("--top-k", type=int, default=0, metavar="N")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="X")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the sampling; without one, every run differs")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of streaming text")
    return parser


def _problems(args) -> Iterator[UserError]:
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        yield UserError("must be at least 1", field="--max-new-tokens")
    if args.raw and args.system is not None:
        yield UserError("takes no --system", field="--raw")
    if args.chat and (args.raw or args.json or args.stop):
        yield UserError("takes none of --raw, --json and --stop", field="--chat")
    if "" in args.stop:
        yield UserError("must not be empty", field="--stop")


@contextlib.contextmanager
def _fields_as_options() -> Iterator[None]:
    """Errors about a field of a request name the option that sets it."""
    try:
        yield
    except UserError as error:
        for problem in error.problems:
            if problem.field:
                problem.field = f"--{problem.field.replace('_', '-')}"
        raise


def main(argv: list[str]) -> None:
    args = _parser().parse_args(argv)
    raise_problems(_problems(args))
    with _fields_as_options():
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
    prompt = (
        tok.encode(args.prompt, bos=tok.adds_bos)
        if args.raw
        else render_chat(tok, [*messages, {"role": "user", "content": args.prompt}], template=args.template)
    )
    with _fields_as_options():  # before seconds or minutes of loading
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
    numbers = {
        "tokens": len(ids),
        "prompt_tokens": len(prompt),
        "finish_reason": reason,
        "tokens_per_second": len(ids) / seconds,
    }
    print(json.dumps({"text": stream.text} | numbers, ensure_ascii=False))


if __name__ == "__main__":
    cli.run(main)
