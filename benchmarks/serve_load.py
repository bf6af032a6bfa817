"""The server under load, and whether its answers are right: python -m benchmarks.serve_load

Starts `minorca.serve` on this machine and keeps it busy with clients that stream greedy answers, each sending a new
request as soon as it has an answer. Then, for half as long, a fifth of them disconnect in the middle of every answer.
Then, for half as long, one client streams beside another that sends what costs the server most (abuse.py).
Exit status 1, with the reasons in the report, if

- a request fails, or an answer differs from what `generate` gives for its prompt alone. In another batch a product may
  be summed in another order, and greedy decoding take another token at a near tie; so each token of an answer that
  differs must have a logit at most TOLERANCE below the largest one, by the model's plain forward on everything before
  it.
- the tokens that the server counts are not those that the clients received.
- a stream stands still for longer than a step and TOLERATED_PAUSE beside the abusive client, or that gets a 5xx.
- requests run or wait after all clients have left, or the server's memory has grown meanwhile by more than GROWTH.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.abuse import TOLERATED_PAUSE, abuse
from benchmarks.common import ROOT, report, spread
from minorca.data.chat_template import render_chat
from minorca.data.tokenizer import Tokenizer, load_tokenizer
from minorca.generate import generate
from minorca.generate.text_stream import REPLACEMENT
from minorca.model.build import fast_dtype, load_model
from minorca.model.network import Mistral
from minorca_kernels import FrozenWeight

NEW_TOKENS = 32
# Of the server: a longer prompt of the abusive client takes a small machine minutes.
MAX_LENGTH = 2048
# Logits are about 20, where neighbouring values of bf16 are 0.125 apart.
TOLERANCE = {torch.bfloat16: 0.5, torch.float32: 1e-3}
GROWTH = 0.05
# Seconds for one answer.
ANSWER_TIMEOUT = 120
# Seconds for the server to notice that all clients have left.
IDLE_TIMEOUT = 10
WORDS = [
    "river",
    "lamp",
    "carpet",
    "engine",
    "violin",
    "harbour",
    "pepper",
    "ladder",
    "meadow",
    "coin",
    "anchor",
    "winter",
    "basket",
    "thunder",
    "mirror",
    "garden",
]


def questions(count: int) -> list[str]:
    """Prompts of 30 to 200 tokens, no two alike."""
    draw = random.Random(0)
    lists = (", ".join(draw.choices(WORDS, k=3 + 3 * n)) for n in range(count))
    return [f"{words}. Write a sentence with {draw.choice(WORDS)} and {draw.choice(WORDS)}." for words in lists]


@dataclass
class Phase:
    """What the clients measured."""

    began: float = field(default_factory=time.perf_counter)
    first_token: list[float] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)
    # By question and text.
    answers: Counter[tuple[int, str]] = field(default_factory=Counter)
    tokens: int = 0
    hung_up: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    def figures(self) -> dict:
        seconds = time.perf_counter() - self.began

        def percentiles(values: list[float]) -> dict[str, float]:
            cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else values * 99
            return {str(p): cuts[p - 1] for p in (50, 90, 99) if cuts}

        return {
            "seconds": seconds,
            "answers": len(self.latency),
            "answers_per_second": len(self.latency) / seconds,
            "tokens_per_second": self.tokens / seconds,
            "first_token_seconds": percentiles(self.first_token),
            "answer_seconds": percentiles(self.latency),
            "hung_up": self.hung_up,
            "errors": dict(self.errors),
        }


class Server:
    """`minorca.serve` in a process of its own.

    Clients speak plain HTTP without a library, because they share the processor with it.
    """

    async def start(self, *options, tree: Path = ROOT) -> None:
        """Starts the server of a checkout."""
        command = [sys.executable, "-m", "minorca.serve", "--port", "0", *map(str, options)]
        environment = os.environ | {"PYTHONPATH": f"{tree}:{tree / 'kernels'}"}
        self.process = await asyncio.create_subprocess_exec(
            *command, cwd=tree, env=environment, stdout=asyncio.subprocess.PIPE
        )
        assert self.process.stdout
        line = (await self.process.stdout.readline()).decode()
        address = re.search(r"serving (\S+) at http://127.0.0.1:(\d+): \d+ slots of (\d+) tokens", line)
        if not address:
            sys.exit(f"the server did not start: {line}")
        self.model, self.port = address[1], address[2]
        self.max_length = int(address[3])

    async def call(self, path: str, body: dict | bytes | None = None):
        """The lines of a response's body, including chunk sizes; closing the iterator disconnects."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            content = body if isinstance(body, bytes) else json.dumps(body).encode() if body else b""
            head = f"{'POST' if body else 'GET'} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
            writer.write(head.encode() + content)
            status = (await reader.readline()).decode().strip()
            if " 200 " not in status:
                raise ConnectionError(status or "no response")
            while await reader.readline() != b"\r\n":
                pass
            async for line in reader:
                yield line
        finally:
            writer.transport.abort()

    async def events(self, path: str, body: dict) -> AsyncGenerator[dict, None]:
        """The events of a stream; raises ConnectionError where one is an error, or the end is missing."""
        async with contextlib.aclosing(self.call(path, body | {"stream": True})) as lines:
            async for line in lines:
                if line.startswith(b"data: [DONE]"):
                    return
                if line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise ConnectionError(event["error"]["message"])
                    yield event
        raise ConnectionError("incomplete answer")

    async def metrics(self) -> dict[str, float]:
        lines = [line.decode() async for line in self.call("/metrics")]
        return {match[1]: float(match[2]) for line in lines if (match := re.match(r"minorca_(\w+) (\S+)", line))}

    async def idle(self) -> float:
        """The seconds until nothing runs or waits; more than IDLE_TIMEOUT if something still does."""
        began = time.perf_counter()
        while time.perf_counter() - began <= IDLE_TIMEOUT:
            metrics = await self.metrics()
            if not metrics["running"] and not metrics["waiting"]:
                break
            await asyncio.sleep(0.05)
        return time.perf_counter() - began

    def memory(self) -> int:
        """The resident set size, in bytes."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    async def end(self) -> None:
        if self.process.returncode is None:
            self.process.terminate()
            await self.process.wait()


async def ask(server: Server, number: int, question: str, phase: Phase, max_pieces: int | None) -> None:
    """Streams one answer; disconnects after `max_pieces` pieces of text, if given."""
    body = {
        "model": server.model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": NEW_TOKENS,
    }
    body |= {"stream_options": {"include_usage": True}}
    began = time.perf_counter()
    first = 0.0
    pieces: list[str] = []
    tokens = None
    async with contextlib.aclosing(server.events("/v1/chat/completions", body)) as events:
        async for event in events:
            tokens = (event["usage"] or {}).get("completion_tokens")
            for choice in event["choices"]:
                text = choice["delta"].get("content")
                if text:
                    if not pieces:
                        first = time.perf_counter() - began
                    pieces.append(text)
            if max_pieces is not None and len(pieces) >= max_pieces:
                phase.hung_up += 1
                return
    if not (tokens and pieces):
        raise ConnectionError("incomplete answer")
    phase.first_token.append(first)
    phase.latency.append(time.perf_counter() - began)
    phase.answers[number, "".join(pieces)] += 1
    phase.tokens += tokens


async def load(server: Server, asked: list[str], clients: int, seconds: float, rude: int) -> Phase:
    """Runs `clients` clients for `seconds`; the first `rude` of them disconnect early."""
    phase = Phase()

    async def client(n: int) -> None:
        draw = random.Random(n)
        while time.perf_counter() - phase.began < seconds:
            number = draw.randrange(len(asked))
            max_pieces = draw.randrange(NEW_TOKENS // 2) if n < rude else None
            try:
                await asyncio.wait_for(ask(server, number, asked[number], phase, max_pieces), ANSWER_TIMEOUT)
            # OSError includes TimeoutError.
            except (OSError, ValueError, LookupError) as error:
                phase.errors[f"{type(error).__name__}: {error}"[:200]] += 1
                await asyncio.sleep(0.1)

    await asyncio.gather(*map(client, range(clients)))
    return phase


def last_logits(hidden_TH: Tensor, weight: FrozenWeight) -> Tensor:
    return weight.linear(hidden_TH[-1:])[0]


@torch.inference_mode()
def widest_gap(model: Mistral, tok: Tokenizer, prompt: list[int], text: str, known: Sequence[int] = ()) -> float | None:
    """How far below the largest logit an answer's tokens are at most; None if one of them is not within TOLERANCE.

    Searches all sequences of ids that decode to the text and begin with those that are known.
    """
    weight = model.embedding.weight
    tolerance = TOLERANCE[weight.dtype]
    paths: list[tuple[float, list[int]]] = [(0.0, list(known))]
    while paths:
        widest, ids = paths.pop()
        if len(ids) == NEW_TOKENS or (ids and ids[-1] in tok.stop_ids):
            if tok.decode(ids) == text:
                return widest
            continue
        logits_V = model(torch.tensor(prompt + ids, device=weight.device), head=last_logits).float()
        below_V = logits_V.max() - logits_V
        for token in (below_V <= tolerance).nonzero()[:, 0].tolist():
            if text.startswith(tok.decode([*ids, token]).rstrip(REPLACEMENT)):
                paths.append((max(widest, below_V[token].item()), [*ids, token]))
    return None


async def run(args: argparse.Namespace, asked: list[str]) -> tuple[dict, dict[str, Phase]]:
    server = Server()
    try:
        await server.start(
            "--model", args.model, "--slots", args.slots, "--queue", 2 * args.clients, "--max-length", MAX_LENGTH
        )
        # Warms up.
        await load(server, asked, args.slots, 1, rude=0)
        before = await server.metrics()
        phases = {"steady": await load(server, asked, args.clients, args.seconds, rude=0)}
        figures: dict[str, Any] = {"steady": phases["steady"].figures()}
        figures["steady"]["idle_after_seconds"] = await server.idle()
        counted = (await server.metrics())["new_tokens_total"] - before["new_tokens_total"]
        figures["lost_tokens"] = counted - phases["steady"].tokens
        memory = server.memory()
        phases["hanging_up"] = await load(server, asked, args.clients, args.seconds / 2, rude=args.clients // 5)
        figures["hanging_up"] = phases["hanging_up"].figures()
        figures["hanging_up"]["idle_after_seconds"] = await server.idle()
        figures["server_bytes"] = {"after_steady": memory, "after_hanging_up": server.memory()}
        figures["abuse"] = await abuse(server, asked[0], args.seconds / 2)
        return figures, phases
    finally:
        await server.end()


def main() -> int:
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.serve_load", description="The server under load, and whether its answers are right."
    )
    options.add_argument(
        "--model", type=Path, default=ROOT / "examples" / "model", metavar="DIR", help="default: examples/model"
    )
    options.add_argument("--clients", type=int, default=64, metavar="N", help="default: 64")
    options.add_argument("--slots", type=int, default=8, metavar="N", help="of the server; default: 8")
    options.add_argument(
        "--seconds",
        type=float,
        default=60,
        metavar="N",
        help="of the first phase, the others take half as long; default: 60",
    )
    options.add_argument("--output", type=Path, metavar="FOLDER", help="write the JSON there too")
    args = options.parse_args()
    tok = load_tokenizer(args.model)
    model = load_model(args.model, fast_dtype(), "cpu")
    asked = questions(24)
    prompts = [render_chat(tok, [{"role": "user", "content": question}]) for question in asked]
    offline = [tok.decode(ids) for ids in generate(model, prompts, NEW_TOKENS, stop_ids=tok.stop_ids)]
    figures, phases = asyncio.run(run(args, asked))

    answers = phases["steady"].answers + phases["hanging_up"].answers
    wrong: Counter[tuple[int, str]] = Counter()
    tied: Counter[tuple[int, str]] = Counter()
    widest_tie = 0.0
    for (number, text), count in answers.items():
        if text == offline[number]:
            continue
        gap = widest_gap(model, tok, prompts[number], text)
        if gap is None:
            wrong[number, text] = count
        else:
            tied[number, text] = count
            widest_tie = max(widest_tie, gap)
    growth = figures["server_bytes"]["after_hanging_up"] / figures["server_bytes"]["after_steady"] - 1
    problems = {
        "requests failed": sum(sum(phase.errors.values()) for phase in phases.values()),
        "answers are wrong": wrong.total(),
        "others waited for an abusive client": figures["abuse"]["pause_seconds"]
        > figures["abuse"]["step_seconds"] + TOLERATED_PAUSE,
        "an abusive request failed the server": any(status.startswith("5") for status in figures["abuse"]["statuses"]),
        "tokens are lost": figures["lost_tokens"],
        "requests still run": any(figures[name]["idle_after_seconds"] > IDLE_TIMEOUT for name in phases),
        "the server's memory has grown": growth > GROWTH,
    }
    result = {
        "model": args.model.name,
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        "clients": args.clients,
        "slots": args.slots,
        "questions": len(asked),
        "prompt_tokens": spread(list(map(len, prompts))),
        "new_tokens": NEW_TOKENS,
        **figures,
        "server_growth": growth,
        "answers": answers.total(),
        "as_offline": answers.total() - wrong.total() - tied.total(),
        "by_near_ties": tied.total(),
        "widest_tie": widest_tie,
        "questions_with_several_answers": sum(texts > 1 for texts in Counter(number for number, _ in answers).values()),
        "wrong": [
            {"question": asked[number], "expected": offline[number], "found": text} for number, text in list(wrong)[:5]
        ],
        "problems": [problem for problem, found in problems.items() if found],
    }
    report(result, "serve-load", args.output)
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
