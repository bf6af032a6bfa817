"""The comparison itself: what each model answers, how likely it finds the reference answers, and how far apart their
distributions are. Where no prompt has a reference answer, A's greedy answers are scored.

Axes: M scored tokens, C those of a chunk, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import cycle, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minorca.compare.paired_test import TEST, paired
from minorca.compare.prompts import Prompt, Rendered
from minorca.compare.sides import Runner, flatten, why_not_comparable
from minorca.data.tokenizer import Tokenizer
from minorca.generate.text_stream import TextStream
from minorca.progress import progress_bar

# Tokens of a forward, unless a row alone has more.
BATCH_TOKENS = 4096
KL = ("kl_a_b", "kl_b_a")

# Of one row: name -> a number for each scored token.
Scores = dict[str, np.ndarray]


def compare(
    runners: Sequence[Runner],
    prompts: Sequence[Prompt],
    rendered: Sequence[tuple[Rendered, Rendered]],
    max_new_tokens: int,
) -> dict[str, Any]:
    """What is written as JSON; docs/evaluation.md says what each field is."""
    a, b = (runner.side for runner in runners)
    refused = why_not_comparable(a, b, rendered)
    asked = [n for n, prompt in enumerate(prompts) if prompt.messages]
    ids = [
        dict(zip(asked, runner.answer([rendered[n][which].prompt for n in asked], max_new_tokens)))
        for which, runner in enumerate(runners)
    ]
    answers = [{n: runner.side.tok.decode(of_row) for n, of_row in of.items()} for runner, of in zip(runners, ids)]
    texts = {n: prompt.reference for n, prompt in enumerate(prompts)}
    has_references = any(texts.values())
    if not has_references and refused is None:
        texts = answers[0]
        continued = [_continued(one, ids[0][n]) for n, (one, _) in enumerate(rendered)]
        rendered = list(zip(continued, continued))
    scored = [n for n, (one, two) in enumerate(rendered) if any(one.scored) and any(two.scored)]
    scores = dict(zip(scored, score(runners, [rendered[n] for n in scored], refused is None)))
    rows = [
        _row(prompt, [of_side.get(n) for of_side in answers], texts.get(n, ""), scores.get(n), a.tok, rendered[n][0])
        for n, prompt in enumerate(prompts)
    ]
    size = sum(len(texts[n].encode()) for n in scored)
    # a model finds its own answers likelier
    test = paired([rows[n]["difference"] for n in scored]) if has_references else None
    overall = [_perplexities([scores[n][name] for n in scored], size) for name in ("logp_a", "logp_b")]
    return {
        "a": a.described() | overall[0],
        "b": b.described() | overall[1],
        "scored": ("the reference answers" if has_references else "A's answers") if scored else None,
        "difference": test._asdict() | {"test": TEST} if test and scored else None,
        "kl": _divergences([scores[n] for n in scored]) if scored and refused is None else None,
        "kl_refused": refused,
        "same_answers": sum(rows[n]["same"] for n in asked),
        "answers": len(asked),
        "rows": rows,
    }


def _continued(rendered: Rendered, answer: list[int]) -> Rendered:
    """A prompt with an answer that is scored."""
    prompt = rendered.prompt
    return Rendered(prompt, prompt + answer, [False] * len(prompt) + [True] * len(answer))


# ------------------------------------------------------------------------------------------------------------ scoring


@torch.inference_mode()
def score(
    runners: Sequence[Runner], rendered: Sequence[tuple[Rendered, Rendered]], comparable: bool
) -> Iterator[Scores]:
    """Of each row, the log-probabilities of its scored tokens under both models (`logp_a`, `logp_b`), and where the
    rows are the same ids for both, the divergences `kl_a_b` and `kl_b_a` at each, in nats, in fp64.
    """
    with progress_bar("scores", len(rendered), "rows") as bar:
        for start, end in pairwise(_batches(rendered)):
            yield from _score_batch(runners, rendered[start:end], comparable)
            bar.update(end - start)


def _batches(rendered: Sequence[tuple[Rendered, Rendered]]) -> list[int]:
    """Where each batch starts, and the end: consecutive rows of at most BATCH_TOKENS, or one row."""
    starts, tokens = [0], 0
    for n, sides in enumerate(rendered):
        longest = max(len(row.ids) for row in sides)
        if tokens and tokens + longest > BATCH_TOKENS:
            starts.append(n)
            tokens = 0
        tokens += longest
    return [*starts, len(rendered)]


def _score_batch(
    runners: Sequence[Runner], rendered: Sequence[tuple[Rendered, Rendered]], comparable: bool
) -> Iterator[Scores]:
    flats = [flatten(rows, runner.device) for runner, rows in zip(runners, zip(*rendered))]
    sides = [runner.log_probabilities(flat) for runner, flat in zip(runners, flats)]
    if comparable:
        chunks = [
            (_of(targets, a), _of(targets, b), _divergence(a, b), _divergence(b, a))
            for (targets, a), (_, b) in zip(*sides)
        ]
        columns = [torch.cat(column) for column in zip(*chunks)]
    else:
        columns = [torch.cat([_of(targets, logp) for targets, logp in side]) for side in sides]
    # of comparable sides both are split alike
    parts = [column.cpu().split(flat.counts) for column, flat in zip(columns, cycle(flats))]
    for of_row in zip(*parts):
        yield {name: values.numpy() for name, values in zip(("logp_a", "logp_b", *KL), of_row)}


def _of(targets_C: Tensor, logp_CV: Tensor) -> Tensor:
    return logp_CV.gather(1, targets_C[:, None])[:, 0]


def _divergence(p_CV: Tensor, q_CV: Tensor) -> Tensor:
    """KL(p || q) [C] of distributions given as log-probabilities. Rounding may leave equal ones below 0."""
    return (p_CV.exp() * (p_CV - q_CV)).sum(1).clamp(min=0)


# ------------------------------------------------------------------------------------------------------------ results


def _row(
    prompt: Prompt,
    answers: Sequence[str | None],
    text: str,
    scores: Scores | None,
    tok: Tokenizer,
    rendered: Rendered,
) -> dict[str, Any]:
    """text: what is scored. tok, rendered: those of A, which are B's too where the row has divergences."""
    row: dict[str, Any] = {
        "place": f"{prompt.path}, {prompt.where}",
        "messages": [{"role": message["role"], "content": message["content"]} for message in prompt.messages],
        "reference": prompt.reference,
        "same": answers[0] == answers[1],
    }
    size = len(text.encode())
    for side, answer in zip("ab", answers):
        row[side] = {"answer": answer} | (_perplexities([scores[f"logp_{side}"]], size) if scores else {})
    row["difference"] = row["a"]["logp"] - row["b"]["logp"] if scores and prompt.reference else None
    row["kl"] = None
    if scores and KL[0] in scores:
        row["kl"] = _divergences([scores])
        ids = [i for i, scored in zip(rendered.ids, rendered.scored) if scored]
        row["tokens"] = {"text": _token_texts(tok, ids)} | {name: values.tolist() for name, values in scores.items()}
    return row


def _perplexities(logps: Sequence[np.ndarray], size: int) -> dict[str, float | int]:
    """Of log-probabilities of rows' tokens, whose text has `size` bytes."""
    tokens = sum(map(len, logps))
    total = float(sum(values.sum() for values in logps))
    per = {"perplexity": tokens, "perplexity_per_byte": size}
    return {"tokens": tokens, "logp": total} | {
        name: _exp(-total / count) if count else math.nan for name, count in per.items()
    }


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _divergences(scores: Sequence[Scores]) -> dict[str, float]:
    """The means over all tokens."""
    return {name: float(np.concatenate([of_row[name] for of_row in scores]).mean()) for name in KL}


def _token_texts(tok: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each id adds; empty within a character of several."""
    names = {i: name for name, i in tok.control_ids.items()}
    stream = TextStream(tok, continues=True)
    texts = [names.get(i) or stream.push(i) for i in ids]
    return [*texts[:-1], texts[-1] + stream.finish()]
