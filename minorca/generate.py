"""Text from a model: `generate` for programs, `python -m minorca.generate` for people."""

import json
import sys
import time
from collections.abc import Collection, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from minorca import cli
from minorca.chat import TEMPLATES, render_chat
from minorca.errors import UserError
from minorca.kv_cache import KVCache
from minorca.loading import fast_dtype, load_model
from minorca.model import Mistral
from minorca.tokenizer import Tokenizer, check_vocabulary, load_tokenizer


def sample(logits_NV: Tensor, temperature: float, top_p: float, top_k: int, random: torch.Generator | None) -> Tensor:
    """One id a row [N]: the likeliest at temperature 0, else drawn from the top_k likeliest (0: all) and then the fewest
    that hold top_p of the probability (Holtzman et al. 2020, arXiv:1904.09751)."""
    if temperature == 0:
        return logits_NV.argmax(-1)
    logits, ids = (logits_NV.float() / temperature).sort(-1, descending=True)
    if top_k:
        logits[:, top_k:] = -torch.inf
    probabilities = logits.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= top_p, 0)
    return ids.gather(-1, probabilities.multinomial(1, generator=random))[:, 0]


@torch.inference_mode()
def decode(
    model: Mistral,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
) -> Iterator[Tensor]:
    """The next ids [N] of all prompts, step after step, from one key/value cache. The caller says when to stop."""
    weight = model.embedding.weight
    random = None if seed is None else torch.Generator(weight.device).manual_seed(seed)
    cu_seqlens = torch.tensor([0, *map(len, prompts)]).cumsum(0)
    cache = KVCache(model.arch, len(prompts), max(map(len, prompts)) + max_new_tokens, weight.dtype, weight.device)
    tokens = torch.tensor([i for prompt in prompts for i in prompt], device=weight.device)
    last = cu_seqlens[1:].to(weight.device) - 1
    logits_NV = model(tokens, attend=cache.prefill(cu_seqlens), head=lambda hidden, head: F.linear(hidden[last], head))
    for left in reversed(range(max_new_tokens)):
        tokens = sample(logits_NV, temperature, top_p, top_k, random)
        yield tokens
        if left:
            logits_NV = model(tokens, attend=cache.step())


def generate(
    model: Mistral,
    prompts: list[list[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop_ids: Collection[int] = (),
    seed: int | None = None,
) -> list[list[int]]:
    """Continues prompts of any lengths together; returns the new ids of each, up to and with its first stop id."""
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one token")
    outs: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    for ids in decode(model, prompts, max_new_tokens, temperature, top_p, top_k, seed):
        for n, token in enumerate(ids.tolist()):
            if n in going:
                outs[n].append(token)
                going -= {n} if token in stop_ids else set()
        if not going:
            break
    return outs


def stream(model: Mistral, tok: Tokenizer, prompt: list[int], show, **options) -> tuple[list[int], str]:
    """Continues one prompt until a stop id; gives `show` each new piece of text once it is whole UTF-8. Returns ids, text."""
    ids, text = [], ""
    for token in decode(model, [prompt], **options):
        ids.append(token.item())
        whole = tok.decode(ids)
        if not whole.endswith("\ufffd"):  # else the last character's bytes are still coming
            show(whole[len(text) :])
            text = whole
        if ids[-1] in tok.stop_ids:
            break
    whole = tok.decode(ids)
    show(whole[len(text) :])
    return ids, whole


def _parser() -> cli.Parser:
    parser = cli.Parser(prog="minorca.generate", description="Generates text; temperature 0, the default, is greedy.")
    parser.add_argument("--model", required=True, metavar="DIR", help="a model's directory")
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter in PEFT's format")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="one user turn, or the bare text with --raw")
    what.add_argument("--chat", action="store_true", help="a conversation in the terminal; end it with Ctrl-D")
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    parser.add_argument("--template", default="auto", choices=TEMPLATES, help="as data.template when the adapter was trained")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X")
    parser.add_argument("--top-k", type=int, default=0, metavar="N")
    parser.add_argument("--seed", type=int, metavar="N", help="of the sampling; without one, every run differs")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of streaming text")
    return parser


def _check(args) -> None:
    problems = {
        "--max-new-tokens must be at least 1": args.max_new_tokens < 1,
        "--temperature must be 0 or more": not 0 <= args.temperature < float("inf"),
        "--top-p must be over 0 and at most 1": not 0 < args.top_p <= 1,
        "--top-k must be 0 (off) or more": args.top_k < 0,
        "--raw takes no --system": args.raw and args.system is not None,
        "--chat takes neither --raw nor --json": args.chat and (args.raw or args.json),
    }
    if wrong := [message for message, is_wrong in problems.items() if is_wrong]:
        raise UserError("; ".join(wrong))


def _show(text: str) -> None:
    print(text, end="", flush=True)


def main(argv: list[str]) -> None:
    args = _parser().parse_args(argv)
    _check(args)
    tok = load_tokenizer(args.model)
    model = load_model(args.model, fast_dtype(), adapter=args.adapter)
    check_vocabulary(tok, model.arch.vocab_size, args.model)
    options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    messages = [{"role": "system", "content": args.system}] if args.system else []
    if args.chat:
        return _chat(model, tok, messages, args.template, options | {"seed": args.seed})

    prompt = tok.encode(args.prompt, bos=tok.adds_bos) if args.raw else render_chat(
        tok, [*messages, {"role": "user", "content": args.prompt}], template=args.template
    )
    _check_room(model, prompt, args.max_new_tokens)
    started = time.perf_counter()
    ids, text = stream(model, tok, prompt, (lambda text: None) if args.json else _show, seed=args.seed, **options)
    seconds = time.perf_counter() - started
    if not args.json:
        return print()
    reason = "stop" if ids[-1] in tok.stop_ids else "length"
    numbers = {"tokens": len(ids), "prompt_tokens": len(prompt), "finish_reason": reason, "tokens_per_second": len(ids) / seconds}
    print(json.dumps({"text": text} | numbers, ensure_ascii=False))


def _check_room(model: Mistral, prompt: list[int], new: int) -> None:
    limit = model.arch.max_positions
    if not prompt:
        raise UserError("--prompt is empty; give some text")
    if limit is not None and len(prompt) + new > limit:
        raise UserError(f"{len(prompt)} prompt tokens and --max-new-tokens {new} are over the model's {limit} positions; shorten one of them")


def _chat(model: Mistral, tok: Tokenizer, messages: list[dict[str, str]], template: str, options: dict) -> None:
    while True:
        try:
            said = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not said.strip():
            continue
        messages.append({"role": "user", "content": said})
        prompt = render_chat(tok, messages, template=template)
        _check_room(model, prompt, options["max_new_tokens"])
        _, answer = stream(model, tok, prompt, _show, **options)
        print()
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    cli.run(main)
