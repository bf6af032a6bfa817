"""The server under load, and whether it stays right: python -m benchmarks.serve_load [--model DIR] [--clients N] [--seconds N]

Starts `minorca.serve` on this machine and keeps it busy with clients that stream greedy answers, each asking again as soon as it has
one. Then, for half as long, a fifth of them hang up in the middle of every answer. Exit status 1, and the report says why, where

- a request fails, or an answer is another than `generate` gives for its prompt alone. In another batch a product may be summed in another
  order and greedy decoding go the other way at a near tie; so each token of an answer that differs must have, by the model's plain
  forward on all before it, a logit at most TOLERANCE below the largest one.
- the tokens that the server counts are not those that came.
- requests run or wait when all clients have left, or the server has grown meanwhile by more than GROWTH.
"""

import argparse
import asyncio
import json
import random
import re
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.common import ROOT, report, spread
from minorca.data.chat_template import render_chat
from minorca.data.tokenizer import Tokenizer, load_tokenizer
from minorca.generate.__main__ import generate
from minorca.generate.text_stream import BROKEN
from minorca.model.build import fast_dtype, load_model
from minorca.model.network import Mistral

NEW_TOKENS = 32
TOLERANCE = {torch.bfloat16: 0.5, torch.float32: 1e-3}  # logits are about 20, where neighbours in bf16 are 0.125 apart
GROWTH = 0.05
PATIENCE = 120  # seconds for one answer
IDLE = 10  # seconds for the server to notice that all have left
WORDS = "river lamp carpet engine violin harbour pepper ladder meadow coin anchor winter basket thunder mirror garden".split()


def questions(count: int) -> list[str]:
    """Prompts of 30 to 200 tokens, no two alike."""
    draw = random.Random(0)
    lists = (", ".join(draw.choices(WORDS, k=3 + 3 * n)) for n in range(count))
    return [f"{words}. Write a sentence with {draw.choice(WORDS)} and {draw.choice(WORDS)}." for words in lists]


@dataclass
class Phase:
    """What the clients met."""

    began: float = field(default_factory=time.perf_counter)
    first_token: list[float] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)
    answers: Counter[tuple[int, str]] = field(default_factory=Counter)  # by question and text
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
    """`minorca.serve` in a process of its own. Talked to in plain HTTP by hand: its clients share the processor with it."""

    async def start(self, *options) -> None:
        command = [sys.executable, "-m", "minorca.serve", "--port", "0", *map(str, options)]
        self.process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
        said = (await self.process.stdout.readline()).decode()
        if not (address := re.search(r"serving (\S+) at http://127.0.0.1:(\d+)", said)):
            sys.exit(f"the server did not start, and said: {said}")
        self.model, self.port = address.groups()

    async def call(self, path: str, body: dict | None = None):
        """The lines of an answer's body, chunk sizes among them; closing the iterator hangs up."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            content = json.dumps(body).encode() if body else b""
            head = f"{'POST' if body else 'GET'} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
            writer.write(head.encode() + content)
            status = (await reader.readline()).decode().strip()
            if " 200 " not in status:
                raise ConnectionError(status or "no answer")
            while await reader.readline() != b"\r\n":
                pass
            async for line in reader:
                yield line
        finally:
            writer.transport.abort()

    async def metrics(self) -> dict[str, float]:
        lines = [line.decode() async for line in self.call("/metrics")]
        return {match[1]: float(match[2]) for line in lines if (match := re.match(r"minorca_(\w+) (\S+)", line))}

    async def idle(self) -> float:
        """The seconds until nothing runs or waits; more than IDLE if something still does."""
        began = time.perf_counter()
        while (now := await self.metrics())["running"] or now["waiting"]:
            if time.perf_counter() - began > IDLE:
                break
            await asyncio.sleep(0.05)
        return time.perf_counter() - began

    def memory(self) -> int:
        """Bytes of it that are in memory."""
        return int(re.search(r"VmRSS:\s*(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())[1]) * 1024

    async def end(self) -> None:
        if self.process.returncode is None:
            self.process.terminate()
            await self.process.wait()


async def ask(server: Server, number: int, question: str, phase: Phase, patience: int | None) -> None:
    """One answer, streamed; with `patience`, hung up on after so many pieces of text."""
    body = {
        "model": server.model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": NEW_TOKENS,
    }
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    began, pieces, reason, tokens, done = time.perf_counter(), [], None, None, False
    lines = server.call("/v1/chat/completions", body)
    try:
        async for line in lines:
            if not line.startswith(b"data: "):
                continue
            if done := line.startswith(b"data: [DONE]"):
                break
            event = json.loads(line[6:])
            if "error" in event:
                raise ConnectionError(event["error"]["message"])
            tokens = (event["usage"] or {}).get("completion_tokens")
            for choice in event["choices"]:
                reason = choice["finish_reason"] or reason
                if text := choice["delta"].get("content"):
                    if not pieces:
                        first = time.perf_counter() - began
                    pieces.append(text)
            if patience is not None and len(pieces) >= patience:
                phase.hung_up += 1
                return
        if not (done and reason and tokens and pieces):
            raise ConnectionError("an answer without its end")
        phase.first_token.append(first)
        phase.latency.append(time.perf_counter() - began)
        phase.answers[number, "".join(pieces)] += 1
        phase.tokens += tokens
    finally:
        await lines.aclose()


async def load(server: Server, asked: list[str], clients: int, seconds: float, rude: int) -> Phase:
    """That many clients for that long; the first `rude` of them hang up."""
    phase = Phase()

    async def client(n: int) -> None:
        draw = random.Random(n)
        while time.perf_counter() - phase.began < seconds:
            number, patience = draw.randrange(len(asked)), draw.randrange(NEW_TOKENS // 2) if n < rude else None
            try:
                await asyncio.wait_for(ask(server, number, asked[number], phase, patience), PATIENCE)
            except (OSError, ValueError, LookupError, asyncio.TimeoutError) as error:
                phase.errors[f"{type(error).__name__}: {error}"[:200]] += 1
                await asyncio.sleep(0.1)

    await asyncio.gather(*map(client, range(clients)))
    return phase


@torch.inference_mode()
def widest_gap(model: Mistral, tok: Tokenizer, prompt: list[int], text: str) -> float | None:
    """How far below the largest logit the tokens of an answer are at most; None where one of them is not within TOLERANCE."""
    tolerance, paths = TOLERANCE[model.embedding.weight.dtype], [(0.0, [])]
    while paths:
        widest, ids = paths.pop()
        if len(ids) == NEW_TOKENS or (ids and ids[-1] in tok.stop_ids):
            if tok.decode(ids) == text:
                return widest
            continue
        logits_V = model(torch.tensor(prompt + ids), head=lambda hidden, head: F.linear(hidden[-1], head)).float()
        below_V = logits_V.max() - logits_V
        for token in (below_V <= tolerance).nonzero()[:, 0].tolist():
            if text.startswith(tok.decode([*ids, token]).rstrip(BROKEN)):
                paths.append((max(widest, below_V[token].item()), [*ids, token]))
    return None


async def run(args: argparse.Namespace, asked: list[str]) -> tuple[dict, dict[str, Phase]]:
    server = Server()
    try:
        await server.start("--model", args.model, "--slots", args.slots, "--queue", 2 * args.clients)
        await load(server, asked, args.slots, 1, rude=0)  # what is done once
        before = await server.metrics()
        phases = {"steady": await load(server, asked, args.clients, args.seconds, rude=0)}
        figures = {"steady": phases["steady"].figures()}
        figures["steady"]["idle_after_seconds"] = await server.idle()
        figures["lost_tokens"] = (
            (await server.metrics())["new_tokens_total"] - before["new_tokens_total"] - phases["steady"].tokens
        )
        memory = server.memory()
        phases["hanging_up"] = await load(server, asked, args.clients, args.seconds / 2, rude=args.clients // 5)
        figures["hanging_up"] = phases["hanging_up"].figures()
        figures["hanging_up"]["idle_after_seconds"] = await server.idle()
        figures["server_bytes"] = {"after_steady": memory, "after_hanging_up": server.memory()}
        return figures, phases
    finally:
        await server.end()


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m benchmarks.serve_load", description=__doc__.partition("\n")[0])
    options.add_argument(
        "--model", type=Path, default=ROOT / "examples" / "model", metavar="DIR", help="default: examples/model"
    )
    options.add_argument("--clients", type=int, default=64, metavar="N")
    options.add_argument("--slots", type=int, default=8, metavar="N", help="of the server")
    options.add_argument(
        "--seconds", type=float, default=60, metavar="N", help="of the first phase; the second takes half as long"
    )
    options.add_argument("--output", type=Path, metavar="FOLDER", help="write the JSON there too")
    args = options.parse_args()
    tok, model, asked = load_tokenizer(args.model), load_model(args.model, fast_dtype(), "cpu"), questions(24)
    prompts = [render_chat(tok, [{"role": "user", "content": question}]) for question in asked]
    offline = [tok.decode(ids) for ids in generate(model, prompts, NEW_TOKENS, stop_ids=tok.stop_ids)]
    figures, phases = asyncio.run(run(args, asked))

    answers = phases["steady"].answers + phases["hanging_up"].answers
    others = {
        (number, text): widest_gap(model, tok, prompts[number], text)
        for number, text in answers
        if text != offline[number]
    }
    wrong = {key: answers[key] for key, gap in others.items() if gap is None}
    tied = {key: answers[key] for key, gap in others.items() if gap is not None}
    growth = figures["server_bytes"]["after_hanging_up"] / figures["server_bytes"]["after_steady"] - 1
    problems = {
        "requests failed": sum(sum(phase.errors.values()) for phase in phases.values()),
        "answers are wrong": sum(wrong.values()),
        "tokens are lost": figures["lost_tokens"],
        "requests are left": any(figures[name]["idle_after_seconds"] > IDLE for name in phases),
        "the server has grown": growth > GROWTH,
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
        "as_offline": answers.total() - sum(wrong.values()) - sum(tied.values()),
        "by_near_ties": sum(tied.values()),
        "widest_tie": max((others[key] for key in tied), default=0.0),
        "questions_with_several_answers": sum(texts > 1 for texts in Counter(number for number, _ in answers).values()),
        "wrong": [
            {"question": asked[number], "expected": offline[number], "found": text} for number, text in list(wrong)[:5]
        ],
        "problems": [what for what, is_so in problems.items() if is_so],
    }
    report(result, "serve-load", args.output)
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
