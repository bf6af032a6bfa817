"""What one client sees of a server that does nothing else: the quiet part of serve_chats.py."""

import asyncio
import contextlib
import itertools
import random
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.common import DEVICE, clock
from benchmarks.serve_load import NEW_TOKENS, WORDS, Server

TURNS = 5
SYSTEM_TOKENS = 300
# A CPU computes no more tokens of prompts than these between two decoding steps.
CHUNK = 256


@dataclass
class Answer:
    """What a client receives of one answer, and when.

    Attributes:
        turn: of its conversation, from 0; -1: a single prompt.
        times: of its pieces of text; one is at least a token.
    """

    turn: int = -1
    began: float = field(default_factory=time.perf_counter)
    times: list[float] = field(default_factory=list)
    text: str = ""
    prompt_tokens: int = 0
    tokens: int = 0

    @property
    def first_token(self) -> float:
        return self.times[0] - self.began

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in itertools.pairwise(self.times)]


async def receive(server: Server, answer: Answer, content: str | list[dict] | list[int], max_tokens: int) -> None:
    """Streams a greedy answer to a conversation, or to the ids of a prompt.

    Raises:
        OSError: the request fails, or the answer is incomplete.
    """
    is_chat = isinstance(content[0], dict)
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    body = {"model": server.model, "messages" if is_chat else "prompt": content, "max_tokens": max_tokens}
    body |= {"temperature": 0, "stream_options": {"include_usage": True}}
    async with contextlib.aclosing(server.events(path, body)) as events:
        async for event in events:
            for choice in event["choices"]:
                text = choice["delta"].get("content") if is_chat else choice["text"]
                # Which an answer without any text has too.
                if text or (choice["finish_reason"] and not answer.times):
                    answer.times.append(time.perf_counter())
                    answer.text += text or ""
            if event["usage"]:
                answer.prompt_tokens = event["usage"]["prompt_tokens"]
                answer.tokens = event["usage"]["completion_tokens"]
    if not answer.tokens:
        raise ConnectionError("incomplete answer")


def words(draw: random.Random, tokens: int) -> str:
    """A text of about as many tokens."""
    return " ".join(draw.choices(WORDS, k=tokens))


def random_ids(draw: random.Random, tokens: int) -> list[int]:
    return [draw.randrange(100, 10000) for _ in range(tokens)]


async def receive_all(server: Server, contents: list[Any], max_tokens: int) -> list[Answer]:
    answers = [Answer() for _ in contents]
    await asyncio.gather(*(receive(server, *pair, max_tokens) for pair in zip(answers, contents)))
    return answers


async def last_turn(server: Server, draw: random.Random) -> float:
    """Seconds until the first token of a chat's last turn."""
    messages = [{"role": "system", "content": words(draw, SYSTEM_TOKENS)}]
    answer = Answer()
    for _ in range(TURNS):
        messages.append({"role": "user", "content": words(draw, 200)})
        answer = Answer()
        await receive(server, answer, messages, NEW_TOKENS)
        messages.append({"role": "assistant", "content": answer.text})
    return answer.first_token


async def short_beside_long(server: Server, draw: random.Random) -> dict[str, float]:
    """`hi` after a long prompt; and how long a stream that runs already stands still, in its own steps."""
    stream = Answer()
    streaming = asyncio.create_task(receive(server, stream, random_ids(draw, 16), 1000))
    while len(stream.times) < NEW_TOKENS:
        await asyncio.sleep(0.01)
    step = statistics.median(stream.gaps)
    plain = len(stream.times)
    long = Answer()
    reading = asyncio.create_task(receive(server, long, random_ids(draw, min(6000, server.max_length - 1)), 1))
    await asyncio.sleep(0.5)
    short = Answer()
    await receive(server, short, [{"role": "user", "content": "hi"}], 1)
    await reading
    gaps = stream.gaps[plain - 1 :]
    streaming.cancel()
    await asyncio.gather(streaming, return_exceptions=True)
    await server.idle()
    return {
        "short_beside_long_seconds": short.first_token,
        "long_prompt_seconds": long.first_token,
        "longest_gap_steps": max(gaps) / step,
    }


async def quiet(server: Server, seed: int, with_long: bool) -> dict[str, float]:
    """One round's figures; a seed's prompts are no other seed's.

    Args:
        with_long: also those of prompts of thousands of tokens.
    """
    draw = random.Random(f"quiet {seed}")
    filled = await receive_all(server, [random_ids(draw, 16) for _ in range(8)], NEW_TOKENS)
    chunk = await receive_all(server, [random_ids(draw, CHUNK)], 1)
    figures = {
        "step_seconds": statistics.median(gap for answer in filled for gap in answer.gaps),
        "chunk_seconds": chunk[0].first_token,
        "last_turn_seconds": await last_turn(server, draw),
    }
    eight = await receive_all(server, [random_ids(draw, 850) for _ in range(8)], 1)
    figures["eight_prompts_seconds"] = max(answer.first_token for answer in eight)
    if with_long:
        figures |= await short_beside_long(server, draw)
        longest = await receive_all(server, [random_ids(draw, server.max_length - 1)], 1)
        figures["longest_prompt_seconds"] = longest[0].first_token
    return figures


@torch.inference_mode()
def forward_seconds(theirs: Any, length: int, seed: int) -> float:
    """Of transformers, for a prompt and its next token's logits."""
    ids = torch.tensor([random_ids(random.Random(f"forward {seed}"), length)], device=DEVICE)
    began = clock()
    theirs(ids, logits_to_keep=1)
    return clock() - began
