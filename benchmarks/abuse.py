"""A client that sends what costs a server most, and how long another client's stream stands still meanwhile."""

import asyncio
import json
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.serve_load import Server

# A little less than the server reads.
BODY_BYTES = 2 * 10**6
# Seconds that a stream may stand still beyond a step with a part of a long prompt in it.
TOLERATED_PAUSE = 0.05


def requests(model: str, max_length: int) -> list[tuple[str, bytes]]:
    """Paths and bodies: long texts, many small things, and what just fits.

    Args:
        max_length: how many tokens the server accepts.
    """
    short = [{"role": role, "content": "a"} for _ in range(512) for role in ("user", "assistant")][:-1]
    chats: list[Any] = [
        [{"role": "user", "content": "x" * BODY_BYTES}],
        [{"role": "user", "content": "the quick brown fox " * (max_length // 2)}],
        [{"role": "user", "content": "".join(f"\ue000{n}:" for n in range(10**5))}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}] * (BODY_BYTES // 40)}],
        [{"role": "user", "content": "a"}] * (BODY_BYTES // 40),
        [{"role": "user", "content": "a"} | dict.fromkeys(map(str, range(150)), 1)] * 1000,
        short,
    ]
    prompts: list[Any] = [
        "x" * BODY_BYTES,
        [1] * (BODY_BYTES // 3),
        [[1]] * (BODY_BYTES // 5),
        [[1]] * (2**17 - 2),
        ["a"] * 10**5,
    ]
    many = dict.fromkeys(map(str, range(10**5)), 1)
    bodies = [("/v1/chat/completions", {"messages": messages}) for messages in chats]
    bodies += [("/v1/completions", {"prompt": prompt}) for prompt in prompts]
    bodies += [("/v1/completions", {"prompt": "a"} | more) for more in (many, {"metadata": many}, {"logit_bias": many})]
    return [(path, json.dumps({"model": model, "max_tokens": 1} | body).encode()) for path, body in bodies]


async def longest_pause(server: "Server", question: str, seconds: float) -> float:
    """The longest time between two pieces of an answer, of answers asked for one after another."""
    body = {"model": server.model, "messages": [{"role": "user", "content": question}], "temperature": 0}
    longest = 0.0
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        last = None
        async for line in server.call("/v1/chat/completions", body | {"max_tokens": 200, "stream": True}):
            if line.startswith(b"data: {"):
                now = time.perf_counter()
                longest = max(longest, now - (last or now))
                # The first piece, the role, comes before the prompt was read.
                last = now if last is not None or b'"role"' not in line else None
    return longest


async def abuse(server: "Server", question: str, seconds: float) -> dict[str, Any]:
    """What a client's stream sees alone, beside a client that sends the longest prompts, and beside the abusive one."""
    # From their first token on different, so that the server has none of them in its cache.
    prompts = [[n, *[1] * (server.max_length - 2)] for n in range(2, 66)]
    longest = [json.dumps({"model": server.model, "prompt": prompt, "max_tokens": 1}).encode() for prompt in prompts]
    figures: dict[str, Any] = {"alone_seconds": await longest_pause(server, question, seconds)}
    statuses: Counter[str] = Counter()
    slowest = 0.0

    async def send(sent: list[tuple[str, bytes]]) -> None:
        nonlocal slowest
        while True:
            for path, content in sent:
                began = time.perf_counter()
                try:
                    async for _ in server.call(path, content):
                        pass
                    statuses["200"] += 1
                except ConnectionError as error:
                    statuses[str(error).removeprefix("HTTP/1.1 ")] += 1
                slowest = max(slowest, time.perf_counter() - began)

    for name, sent in {
        "step_seconds": [("/v1/completions", content) for content in longest],
        "pause_seconds": requests(server.model, server.max_length),
    }.items():
        statuses.clear()
        slowest = 0.0
        sending = asyncio.create_task(send(sent))
        figures[name] = await longest_pause(server, question, seconds)
        sending.cancel()
        await server.idle()
    return figures | {"statuses": dict(statuses), "slowest_response_seconds": slowest}
