"""Continuations of several prompts together."""

from collections.abc import Collection

from minorca.generate.engine import Engine, Request
from minorca.generate.sampling import Sampling
from minorca.model.network import Mistral

ROWS = 32  # answers that grow together, at most


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
