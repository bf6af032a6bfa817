"""Continuations of a list of prompts."""

from collections.abc import Collection

from minorca.generate.engine import Engine
from minorca.generate.request import Request
from minorca.generate.sampling import Sampling
from minorca.model.network import Mistral

# Prompts beyond this many wait until others are done.
MAX_SLOTS = 32


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
    """Continues prompts of any lengths together.

    Equal prompts are prefilled once and sampled independently. On a CPU, `minorca.model.build.prepack(model)` makes it
    faster.

    Args:
        model: from `load_model`, on any device.
        prompts: token ids of each prompt.
        max_new_tokens: the longest continuation, in tokens.
        stop_ids: ids that end a continuation.
        temperature, top_p, top_k, min_p, repetition_penalty, seed: as in `Sampling`; the default is greedy.

    Returns:
        The new ids of each prompt, up to and including the first stop id.

    Raises:
        ValueError: there is no prompt, or one without tokens.
        UserError: an id outside the vocabulary, or a setting out of range.
    """
    if not prompts or not all(prompts):
        raise ValueError("expected at least one prompt, and at least one token in each")
    sampling = Sampling(temperature, top_p, top_k, min_p, repetition_penalty, seed)
    requests = [Request(prompt, max_new_tokens, sampling, stop_ids, sample=n) for n, prompt in enumerate(prompts)]
    engine = Engine(model, min(len(prompts), MAX_SLOTS), max(map(len, prompts)) + max_new_tokens)
    for request in requests:
        engine.add(request)
    outputs: dict[Request, list[int]] = {request: [] for request in requests}
    while engine.busy:
        for token in engine.step():
            outputs[token.request].append(token.id)
    return list(outputs.values())
