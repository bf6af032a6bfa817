"""`python -m minorca.generate`: generates text from a prompt, or chats in the terminal."""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Generator, Iterator

from minorca import cli
from minorca.data.chat_template import TEMPLATES, render_chat
from minorca.data.portable_files import load_chat
from minorca.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from minorca.errors import UserError, raise_problems
from minorca.files.safe_io import user_path
from minorca.files.vocabulary import adapted_architecture
from minorca.generate.engine import Engine, open_engine
from minorca.generate.request import Request, check_request, default_max_length
from minorca.generate.sampling import Sampling
from minorca.generate.terminal_chat import run_chat
from minorca.generate.text_stream import TextStream
from minorca.model.architecture import Architecture, read_architecture

DEFAULT_NEW_TOKENS = 512
# The name by which requests choose the adapter of --adapter.
ADAPTER = "adapter"
# Far more than any model's positions hold.
MAX_PROMPT_BYTES = 64 * 2**20


def main(argv: list[str]) -> None:
    args = _parse(argv)
    sampling = _read_sampling(args)
    args.prompt = _read_prompt(args)
    tok = load_tokenizer(args.model)
    arch = read_architecture(args.model)
    check_vocabulary(tok, arch.vocab_size, args.model)
    arch = adapted_architecture(arch, args.adapter)
    tok, recorded = load_chat(tok, arch.vocab_size, args.adapter)
    args.template = args.template or recorded or "auto"
    if args.chat:
        _chat(args, tok, arch, sampling)
    else:
        _complete(args, tok, arch, sampling)


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="minorca.generate", description="Generates text; greedy by default (temperature 0).")
    parser.add_argument("--model", required=True, metavar="DIR", help="the model's directory or hub id")
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter in PEFT's format, or its hub id")
    cli.add_quantization(parser, "nf4: quantize the model while it loads, as a QLoRA adapter was trained on it")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument(
        "--prompt", metavar="TEXT", help="a user message; with --raw, the text to continue; -: standard input"
    )
    mode.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="read the prompt from a file in UTF-8; -: standard input. The newline at its end, which editors add, is "
        "left out, but kept with --raw",
    )
    mode.add_argument("--chat", action="store_true", help="chat in the terminal; /help there lists the commands")
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    parser.add_argument(
        "--template",
        choices=TEMPLATES,
        help="the chat template; default: that of the adapter's training, or auto",
    )
    parser.add_argument("--raw", action="store_true", help="continue the text of the prompt, without a chat template")
    parser.add_argument(
        "--no-parse-control-tokens",
        dest="parse_control_tokens",
        action="store_false",
        help="with --raw: control strings in the text, such as [INST] or </s>, are plain text",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"default: {DEFAULT_NEW_TOKENS}, or the rest of the model's maximum length",
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="default: 0, greedy")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X", help="default: 1, off")
    parser.add_argument("--top-k", type=int, default=0, metavar="N", help="default: 0, off")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="X", help="default: 0, off")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="default: 1, off")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="makes sampling reproducible; default: a random seed")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of streaming text")
    return parser


def _parse(argv: list[str]) -> argparse.Namespace:
    args = build_parser().parse_args(argv)
    raise_problems(_problems(args))
    return args


def _problems(args: argparse.Namespace) -> Iterator[UserError]:
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        yield UserError("must be at least 1", field="--max-new-tokens")
    if args.raw and args.system is not None:
        yield UserError("cannot be combined with --system", field="--raw")
    if not args.parse_control_tokens and not args.raw:
        yield UserError("needs --raw; all other text is plain text", field="--no-parse-control-tokens")
    if args.chat and (args.raw or args.json or args.stop):
        yield UserError("cannot be combined with --raw, --json or --stop", field="--chat")
    if "" in args.stop:
        yield UserError("must not be empty", field="--stop")
    try:
        _read_sampling(args)
    except UserError as error:
        yield from error.problems


def _read_prompt(args: argparse.Namespace) -> str | None:
    """The text of --prompt or --prompt-file; None: neither was given.

    Raises:
        UserError: it cannot be read, is not UTF-8, or is empty.
    """
    if args.prompt_file is None and args.prompt != "-":
        if args.prompt == "":
            raise UserError("is empty; expected text", field="--prompt")
        return args.prompt
    file_name: str = "-" if args.prompt_file is None else args.prompt_file
    is_file = file_name != "-"
    name = file_name if is_file else "standard input"
    try:
        with user_path(name).open("rb") if is_file else contextlib.nullcontext(sys.stdin.buffer) as file:
            content = file.read(MAX_PROMPT_BYTES + 1)
        if len(content) > MAX_PROMPT_BYTES:
            raise UserError(f"has more than {MAX_PROMPT_BYTES} bytes; expected a prompt", path=name)
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"is not valid UTF-8 at byte {error.start}; convert it to UTF-8", path=name) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read ({error}); expected a text file with the prompt", path=name) from None
    if not args.raw:
        text = text.removesuffix("\r\n" if text.endswith("\r\n") else "\n")
    if not text:
        raise UserError("is empty; write the prompt into it", path=name)
    return text


@contextlib.contextmanager
def _fields_as_options() -> Iterator[None]:
    """Errors about a field of a request or a sampling setting name the option that sets it."""
    try:
        yield
    except UserError as error:
        raise_problems(
            UserError(problem.message, field=f"--{problem.field.replace('_', '-')}" if problem.field else None)
            for problem in error.problems
        )


def _read_sampling(args: argparse.Namespace) -> Sampling:
    with _fields_as_options():
        return Sampling(args.temperature, args.top_p, args.top_k, args.min_p, args.repetition_penalty, args.seed)


def _make_request(
    args: argparse.Namespace, prompt: list[int], tok: Tokenizer, arch: Architecture, sampling: Sampling
) -> Request:
    rest = default_max_length(arch) - len(prompt)
    new_tokens = args.max_new_tokens or max(1, min(DEFAULT_NEW_TOKENS, rest))
    return Request(prompt, new_tokens, sampling, tok.stop_ids, ADAPTER if args.adapter else None)


def _adapters(args: argparse.Namespace) -> dict[str, str]:
    return {ADAPTER: args.adapter} if args.adapter else {}


def _open_engine(args: argparse.Namespace) -> Engine:
    quantization = {"quantize": args.quantize, "double_quant": args.double_quant}
    return open_engine(args.model, _adapters(args), slots=1, alone=True, **quantization)


def _chat(args: argparse.Namespace, tok: Tokenizer, arch: Architecture, sampling: Sampling) -> None:
    engine = _open_engine(args)

    def answer(prompt: list[int]) -> Generator[int, None, None]:
        with contextlib.closing(engine.stream(_make_request(args, prompt, tok, arch, sampling))) as tokens:
            for token in tokens:
                yield token.id

    run_chat(answer, tok, args.template, args.system)


def _complete(args: argparse.Namespace, tok: Tokenizer, arch: Architecture, sampling: Sampling) -> None:
    """Streams the answer to one prompt, or prints it as JSON."""
    prompt = _encode_prompt(args, tok)
    request = _make_request(args, prompt, tok, arch, sampling)
    # Before the model is loaded, which may take minutes.
    with _fields_as_options():
        check_request(request, arch.vocab_size, default_max_length(arch), _adapters(args))
    engine = _open_engine(args)

    stream = TextStream(tok, args.stop)
    tokens = 0
    finish_reason = None
    started = time.perf_counter()
    for token in engine.stream(request):
        tokens += 1
        finish_reason = token.finish_reason
        text = stream.push(token.id)
        if not args.json:
            print(text, end="", flush=True)
        if stream.stopped:
            break
    text = stream.finish()
    seconds = time.perf_counter() - started
    if not args.json:
        print(text)
        return
    result = {
        "text": stream.text,
        "tokens": tokens,
        "prompt_tokens": len(prompt),
        "finish_reason": "stop" if stream.stopped else finish_reason,
        "tokens_per_second": tokens / seconds,
    }
    print(json.dumps(result, ensure_ascii=False))


def _encode_prompt(args: argparse.Namespace, tok: Tokenizer) -> list[int]:
    if args.raw:
        return tok.encode_rendered(args.prompt, args.parse_control_tokens)
    system = [{"role": "system", "content": args.system}] if args.system else []
    return render_chat(tok, [*system, {"role": "user", "content": args.prompt}], template=args.template)


if __name__ == "__main__":
    cli.run(main)
