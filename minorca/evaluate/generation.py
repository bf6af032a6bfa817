"""Generation until stop strings, as lm_eval's tasks ask for it: the tasks' options, and the texts."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from minorca.data.shipped_template import name_of
from minorca.data.tokenizer import Tokenizer
from minorca.errors import UserError, raise_problems
from minorca.files.safe_io import quote
from minorca.generate.engine import Engine
from minorca.generate.request import Request
from minorca.generate.sampling import Sampling

# what a task's generation_kwargs may set of sampling
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# and of the answer's length, the first of which counts
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class Generation(NamedTuple):
    """What to generate, and the strings before which its text ends."""

    request: Request
    stop: list[str]

    @property
    def options(self) -> list:
        """All that the text follows from beside the prompt, the model and its arithmetic."""
        request = self.request
        sampling = [getattr(request.sampling, name) for name in (*SAMPLING, "seed")]
        return [request.max_new_tokens, sampling, request.sample, sorted(request.stop_ids), self.stop]


class GenerationOptions(NamedTuple):
    """A task's generation_kwargs, read.

    Attributes:
        sampling: what every request has, greedy or not; but for its seed.
    """

    new_tokens: int
    stop: list[str]
    sampling: Sampling

    def of(self, prompt: list[int], sample: int, tok: Tokenizer) -> Generation:
        """One generation with these options. What it draws is a function of its prompt and of `sample`, the number of
        equal ones before it.
        """
        sampling = self.sampling
        if is_sampled := sampling.temperature > 0:
            digest = hashlib.sha256(np.array(prompt, np.int64).tobytes()).digest()
            sampling = replace(sampling, seed=int.from_bytes(digest[:4], "big"))
        ends = {tok.control_ids[term] for term in self.stop if term in tok.control_ids}
        stop_ids = tok.stop_ids | ends
        request = Request(prompt, self.new_tokens, sampling, stop_ids, sample=sample if is_sampled else 0)
        return Generation(request, self.stop)


def read_options(kwargs: dict, tok: Tokenizer, default_tokens: int, max_length: int) -> GenerationOptions:
    """A task's generation_kwargs, as lm_eval understands them.

    Raises:
        UserError: what is unknown, of another type or out of range.
    """
    sampling = check_options(kwargs)
    options: dict[str, Any] = {**normalize_gen_kwargs(kwargs, default_tokens)}
    eos = None if tok.eos_id is None else name_of(tok, tok.eos_id)
    stop = [term for term in handle_stop_sequences(options["until"], eos) if term]
    new_tokens = options["max_gen_toks"]
    if not 1 <= new_tokens < max_length:
        message = f"is {new_tokens}; expected 1 to {max_length - 1}: the model has {max_length} positions"
        raise UserError(message, field="generation_kwargs.max_gen_toks")
    return GenerationOptions(new_tokens, stop, sampling)


def check_options(kwargs: Any) -> Sampling:
    """How generation_kwargs say that tokens are chosen, but for the seed.

    Raises:
        UserError: what is unknown, of another type or out of any model's range.
    """
    if not isinstance(kwargs, dict):
        raise UserError(f"is {quote(kwargs)}; expected a mapping", field="generation_kwargs")
    raise_problems(_problems(kwargs))
    options: dict[str, Any] = {**normalize_gen_kwargs(kwargs)}
    # as in transformers, the others mean nothing without draws
    names = SAMPLING if options["do_sample"] else ("repetition_penalty",)
    try:
        sampling = Sampling(**{name: options[name] for name in names if name in options})
    except UserError as error:
        for problem in error.problems:
            problem.field = f"generation_kwargs.{problem.field}"
        raise
    if options["do_sample"] and not sampling.temperature:
        raise UserError("is 0 or missing; do_sample needs one over 0", field="generation_kwargs.temperature")
    return sampling


def _problems(kwargs: dict) -> Iterator[UserError]:
    known = ("until", "do_sample", "num_beams", *LENGTHS, *SAMPLING)
    for key in sorted(kwargs.keys() - set(known), key=str):
        yield UserError(f"has the unknown {key}; expected {', '.join(known)}", field="generation_kwargs")

    def wrong(key: str, expected: str) -> UserError:
        return UserError(f"is {quote(kwargs[key])}; expected {expected}", field=f"generation_kwargs.{key}")

    until = kwargs.get("until") or []
    if not all(isinstance(term, str) for term in ([until] if not isinstance(until, list) else until)):
        yield wrong("until", "a text or a list of texts")
    if not isinstance(kwargs.get("do_sample"), bool | None):
        yield wrong("do_sample", "true or false")
    if kwargs.get("num_beams", 1) != 1:
        yield wrong("num_beams", "1; beam search is not implemented")
    for key in (*LENGTHS, "top_k"):
        # lm_eval takes a length that is null for none
        if not _is(kwargs.get(key, 0), int | None if key in LENGTHS else int):
            yield wrong(key, "an integer")
    for key in SAMPLING:
        if key != "top_k" and not _is(kwargs.get(key, 0), int | float):
            yield wrong(key, "a number")


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def generate_texts(engine: Engine, tok: Tokenizer, jobs: list[Generation]) -> Iterator[tuple[int, str, int]]:
    """Of each job, as they end: its index, its text, and how many tokens it took, with those of the prompt."""
    # A stop string ends in the last tokens; two more, as in lm_eval, for one that is divided in another way.
    reach = [max((len(tok.encode(term)) for term in job.stop), default=0) + 2 for job in jobs]
    places = {job.request: place for place, job in enumerate(jobs)}
    written: list[list[int]] = [[] for _ in jobs]
    for job in jobs:
        engine.add(job.request)
    while engine.busy:
        for token in engine.step():
            # ended at the token before, which came in the same step
            if token.request not in places:
                continue
            place = places[token.request]
            ids, stop = written[place], jobs[place].stop
            ids.append(token.id)
            end = tok.decode(ids[-reach[place] :])
            if token.finish_reason or any(term in end for term in stop):
                engine.cancel(token.request)
                del places[token.request]
                text = postprocess_generated_text(tok.decode(ids), stop, None)
                yield place, text, len(token.request.prompt) + len(ids)
