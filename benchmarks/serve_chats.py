"""Chats on the server, beside what another commit's server does with them: python -m benchmarks.serve_chats

    git worktree add /tmp/before COMMIT
    python -m benchmarks.serve_chats --before /tmp/before

Starts the server of this checkout and, with --before, that of another one; both are measured in turn, in each round
one after the other, with the same prompts, and no prompt of a round is another's. The final figures need a machine
that does nothing else.

quiet: one client. What has a prompt of thousands of tokens is measured in the first round only.

- the first token of the fifth turn of a chat of about 1,500 tokens
- `hi`, sent half a second after a prompt of 6,000 tokens, while another client's answer streams
- eight prompts of 850 tokens at once, until all have their first token
- a prompt of the greatest length, beside transformers' forward of as many tokens with the same weights and threads

load: clients that each have chats of five turns, whose prompts are the answers received so far and a new message, or
send single prompts, of 20 to 4,000 tokens; answers have up to 32 tokens. A round ends with the answers that are being
waited for after its seconds, and clients go on with their chats in the next one. The cache hit rate and the latencies
are those of all rounds together.

Every answer is checked by the model's plain forward on the whole conversation: each token must have a logit at most
TOLERANCE below the largest one (serve_load.py), which another client's answer would not. Exit status 1 if an answer
is wrong, a request fails, or the tokens that a server counts are not those that its clients received. Targets are
reported with what was measured, and do not change the exit status.
"""

import argparse
import asyncio
import math
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import DEVICE, ROOT, peer, report, spread
from benchmarks.compare_trees import commit
from benchmarks.serve_load import NEW_TOKENS, TOLERANCE, WORDS, Server, widest_gap
from benchmarks.serve_quiet import SYSTEM_TOKENS, TURNS, Answer, forward_seconds, quiet, receive, receive_all, words
from minorca.data.chat_template import render_chat
from minorca.data.tokenizer import Tokenizer, load_tokenizer
from minorca.model.build import fast_dtype, load_model
from minorca.model.network import Mistral
from minorca_kernels import FrozenWeight

SYSTEMS = 3
# The shares of conversations that are chats, and of chats in which a message has a pasted text.
CHATS = 0.85
PASTES = 0.1
# For one answer: a machine of two cores reads the first prompts of 64 clients in more than a minute.
ANSWER_TIMEOUT = 600


def log_uniform(draw: random.Random, low: int, high: int) -> int:
    return round(math.exp(draw.uniform(math.log(low), math.log(high))))


def question(draw: random.Random, tokens: int) -> str:
    """About as many tokens, whose answer is no other question's."""
    return f"{words(draw, tokens - 10)}. Write a sentence with {draw.choice(WORDS)} and {draw.choice(WORDS)}."


@dataclass
class Client:
    """What one client sends; it is the same for each server."""

    draw: random.Random
    systems: list[str]
    conversations: list[list[dict]] = field(default_factory=list)
    # Messages still to be sent in the last one.
    unsent: list[str] = field(default_factory=list)

    def next_prompt(self) -> tuple[int, list[dict]]:
        """The turn, or -1 for a single prompt, and the conversation up to the new message."""
        if not self.unsent:
            self._begin()
        messages = self.conversations[-1]
        messages.append({"role": "user", "content": self.unsent.pop(0)})
        is_single = messages[0]["role"] != "system"
        return -1 if is_single else len(messages) // 2 - 1, messages

    def _begin(self) -> None:
        draw = self.draw
        if draw.random() >= CHATS:
            self.unsent = [question(draw, log_uniform(draw, 20, 4000))]
            self.conversations.append([])
            return
        self.unsent = [question(draw, draw.randint(20, 100)) for _ in range(TURNS)]
        if draw.random() < PASTES:
            self.unsent[draw.randrange(TURNS)] = question(draw, log_uniform(draw, 200, 3000))
        self.conversations.append([{"role": "system", "content": draw.choice(self.systems)}])

    def give_up(self) -> None:
        """After a failure: the next prompt is a new conversation's."""
        self.conversations[-1].pop()
        self.unsent.clear()


@dataclass
class Side:
    """A server under load, its clients, and what they measured in all rounds."""

    tree: Path
    clients: list[Client]
    server: Server = field(default_factory=Server)
    quiet: list[dict[str, float]] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    counted: Counter[str] = field(default_factory=Counter)

    async def load(self, seconds: float) -> None:
        """Runs all clients for so long; they end with the answers that they are waiting for."""
        before = await self.server.metrics()
        done = len(self.answers)
        began = time.perf_counter()
        await asyncio.gather(*(self._run(client, began + seconds) for client in self.clients))
        tokens = sum(answer.tokens for answer in self.answers[done:])
        self.tokens_per_second.append(tokens / (time.perf_counter() - began))
        await self.server.idle()
        after = await self.server.metrics()
        self.counted.update({name: int(after[name] - before[name]) for name in after if name.endswith("tokens_total")})

    async def _run(self, client: Client, until: float) -> None:
        while time.perf_counter() < until:
            turn, messages = client.next_prompt()
            answer = Answer(turn)
            try:
                await asyncio.wait_for(receive(self.server, answer, messages, NEW_TOKENS), ANSWER_TIMEOUT)
            # OSError includes TimeoutError.
            except (OSError, ValueError, LookupError) as error:
                self.errors[f"{type(error).__name__}: {error}"[:200]] += 1
                client.give_up()
                await asyncio.sleep(0.1)
            else:
                messages.append({"role": "assistant", "content": answer.text})
                self.answers.append(answer)

    @property
    def conversations(self) -> list[list[dict]]:
        return [conversation for client in self.clients for conversation in client.conversations]

    def figures(self) -> dict[str, Any]:
        groups = {
            "all": self.answers,
            "first_turns": [answer for answer in self.answers if answer.turn == 0],
            "follow_up_turns": [answer for answer in self.answers if answer.turn > 0],
        }
        first_token = {name: percentiles([a.first_token for a in answers]) for name, answers in groups.items()}
        cached = self.counted.get("cached_prompt_tokens_total")
        return {
            "quiet": {name: spread([f[name] for f in self.quiet if name in f]) for name in self.quiet[0]},
            "answers": len(self.answers),
            "first_token_seconds": first_token,
            "gap_seconds": percentiles([gap for answer in self.answers for gap in answer.gaps]),
            "tokens_per_second": spread(self.tokens_per_second),
            "prompt_tokens": percentiles([float(answer.prompt_tokens) for answer in self.answers]),
            "cache_hit_rate": None if cached is None else cached / max(self.counted["prompt_tokens_total"], 1),
            "errors": dict(self.errors),
            "lost_tokens": self.counted["new_tokens_total"] - sum(answer.tokens for answer in self.answers),
        }


def percentiles(values: list[float]) -> dict[str, float | None]:
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else values * 99
    return {str(p): cuts[p - 1] if cuts else None for p in (50, 99)} | {"values": len(values)}


def rows_logits(rows: list[int], hidden_TH: Tensor, weight: FrozenWeight) -> Tensor:
    return weight.linear(hidden_TH[rows])


@torch.inference_mode()
def near_ids(model: Mistral, tok: Tokenizer, messages: list[dict], prompts: list[list[int]]) -> list[list[int]]:
    """Of each answer of a conversation, the ids that its text is encoded to, up to the first that is no near tie.

    Args:
        prompts: what the answers were given to.
    """
    weight = model.embedding.weight
    ids = render_chat(tok, messages, add_generation_prompt=False)
    starts = [len(prompt) if ids[: len(prompt)] == prompt else len(ids) for prompt in prompts]
    answers = [ids[start : start + NEW_TOKENS] for start in starts]
    rows = [row for start, answer in zip(starts, answers) for row in range(start - 1, start - 1 + len(answer))]
    logits_TV = model(torch.tensor(ids, device=weight.device), head=partial(rows_logits, rows)).float()
    chosen_T1 = torch.tensor(sum(answers, []), device=weight.device)[:, None]
    near = iter((logits_TV.amax(1) - logits_TV.gather(1, chosen_T1)[:, 0] <= TOLERANCE[weight.dtype]).tolist())
    known = []
    for answer in answers:
        pairs = list(zip(answer, near))
        first = next((place for place, (_, is_near) in enumerate(pairs) if not is_near), len(pairs))
        stop = next((place + 1 for place, token in enumerate(answer) if token in tok.stop_ids), len(pairs))
        known.append(answer[: min(first, stop)])
    return known


def wrong_answers(model: Mistral, tok: Tokenizer, conversation: list[dict]) -> list[str]:
    """The answers of a conversation that are not greedy ones.

    Where the ids of an answer's text are not those that were generated, others that decode to it are searched for.
    """
    places = [place for place, message in enumerate(conversation) if message["role"] == "assistant"]
    if not places:
        return []
    prompts = [render_chat(tok, conversation[:place]) for place in places]
    wrong = []
    for place, prompt, known in zip(places, prompts, near_ids(model, tok, conversation[: places[-1] + 1], prompts)):
        text = conversation[place]["content"]
        # Few are generated otherwise than their text is encoded, and most of these at their end only.
        begins = (known, known[:-2], [])
        if all(widest_gap(model, tok, prompt, text, begin) is None for begin in begins):
            wrong.append(text)
    return wrong


def targets(after: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    """What the server is meant to reach, beside what was measured."""
    quiet = {name: values["median"] for name, values in after["quiet"].items()}
    gap = after["gap_seconds"]["99"]
    limit = 3 * quiet["step_seconds"] + quiet["chunk_seconds"]
    found = {"gap_seconds_p99": {"measured": gap, "at_most": limit, "met": gap is not None and gap <= limit}}
    if before:
        speedup = before["quiet"]["last_turn_seconds"]["median"] / quiet["last_turn_seconds"]
        found["last_turn_speedup"] = {"measured": speedup, "at_least": 4, "met": speedup >= 4}
    return found


async def measure(args: argparse.Namespace, sides: list[Side], theirs: Any) -> list[float]:
    """Measures all sides in turn; returns the seconds of transformers' forwards."""
    try:
        for side in sides:
            options = ("--model", args.model.resolve(), "--slots", args.slots, "--queue", 2 * args.clients + 8)
            await side.server.start(*options, tree=side.tree)
            # Warms up.
            await receive_all(side.server, [[n] * 300 for n in range(2, 10)], NEW_TOKENS)
        for n in range(args.rounds):
            for side in sides:
                # A long prompt takes a CPU half a minute.
                side.quiet.append(await quiet(side.server, n, with_long=n == 0))
                print(side.tree, side.quiet[-1], file=sys.stderr, flush=True)
        length = sides[0].server.max_length - 1
        forwards = [forward_seconds(theirs, length, n) for n in range(args.rounds)]
        for _ in range(args.rounds):
            for side in sides:
                await side.load(args.seconds)
                print(side.tree, f"{side.tokens_per_second[-1]:.1f} tokens/s", file=sys.stderr, flush=True)
        return forwards
    finally:
        for side in sides:
            await side.server.end()


def clients_of(count: int) -> list[Client]:
    draw = random.Random("systems")
    systems = [words(draw, SYSTEM_TOKENS) for _ in range(SYSTEMS)]
    return [Client(random.Random(f"client {n}"), systems) for n in range(count)]


def parse() -> argparse.Namespace:
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.serve_chats", description="Chats on the server, beside another commit's."
    )
    options.add_argument(
        "--model", type=Path, default=ROOT / "examples" / "model", metavar="DIR", help="default: examples/model"
    )
    options.add_argument("--before", type=Path, metavar="DIR", help="a checkout of another commit")
    options.add_argument("--clients", type=int, default=64, metavar="N", help="default: 64")
    options.add_argument("--slots", type=int, default=8, metavar="N", help="of a server; default: 8")
    options.add_argument("--rounds", type=int, default=2, metavar="N", help="default: 2")
    options.add_argument(
        "--seconds", type=float, default=20, metavar="N", help="of load on each server in each round; default: 20"
    )
    options.add_argument("--output", type=Path, metavar="FOLDER", help="write the JSON there too")
    args = options.parse_args()
    if args.before and not (args.before / "minorca").is_dir():
        options.error(f"{args.before} is not a checkout of minorca")
    return args


def main() -> int:
    args = parse()
    trees = {"before": args.before.resolve()} if args.before else {}
    sides = [Side(tree, clients_of(args.clients)) for tree in (trees | {"after": ROOT.resolve()}).values()]
    tok = load_tokenizer(args.model)
    model = load_model(args.model, fast_dtype(), DEVICE)
    theirs = peer(args.model, model)
    forwards = asyncio.run(measure(args, sides, theirs))
    figures = [
        side.figures() | {"wrong": [text for talk in side.conversations for text in wrong_answers(model, tok, talk)]}
        for side in sides
    ]
    before, after = figures[0] if args.before else None, figures[-1]
    problems = {
        "requests failed": any(found["errors"] for found in figures),
        "answers are wrong": any(found["wrong"] for found in figures),
        "tokens are lost": any(found["lost_tokens"] for found in figures),
    }
    settings = {name: getattr(args, name) for name in ("clients", "slots", "rounds", "seconds")}
    result = {
        "model": args.model.name,
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        **settings,
        "new_tokens": NEW_TOKENS,
        "commits": [commit(side.tree) for side in sides],
        "before": before,
        "after": after,
        "transformers_forward_seconds": spread(forwards),
        "targets": targets(after, before),
        "problems": [problem for problem, found in problems.items() if found],
    }
    report(result, "serve-chats", args.output)
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
