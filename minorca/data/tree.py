"""Answers to one prompt, rendered apart, to the ids of a tree: the prompt once, then every answer."""

from dataclasses import dataclass, field

import numpy as np

from minorca.data.conversation import Conversation, Preference, drop_empty_answers, is_trained_answer
from minorca.errors import UserError

STRIPPED = "with white space around answers removed"
LEFT_OUT = "with empty answers left out"
REPEATED = "with repeated answers left out"
EQUAL = "with equal scores, which make no pairs"


@dataclass
class Tree:
    """A prompt and its branches, end to end.

    Attributes:
        ids: [n] uint32.
        trained: [n] bool, True for trained tokens; every branch ends in one.
        starts: where each branch starts.
        scores: of each branch.
        dropped: why it cannot be trained on; None if it can.
        notes: what the user should know of it, to be counted.
    """

    ids: np.ndarray
    trained: np.ndarray
    starts: list[int]
    scores: list[float]
    dropped: str | None = None
    notes: list[str] = field(default_factory=list)


def select_answers(preference: Preference, pairs: str, template: str) -> tuple[Preference | None, list[str]]:
    """The answers to render, best first, and what the user should know of them, to be counted.

    White space around answers is removed, since one of them may have it and the other not, which would be learned. At
    their beginning, template none keeps what all have alike: it separates the answer from the prompt.

    Args:
        pairs: `data.pairs`.

    Returns:
        None in place of the answers if all are empty, or there is no pair without an empty one.
    """
    beginnings = {_beginning(answer) for answer in preference.answers}
    keeps_beginning = template == "none" and len(beginnings) == 1
    answers = [_stripped(answer, keeps_beginning) for answer in preference.answers]
    notes = [STRIPPED] if answers != preference.answers else []
    ranked = sorted(zip(answers, preference.scores), key=lambda answer: -answer[1])
    filled = [(answer, score) for answer, score in ranked if not drop_empty_answers(answer.messages)[1]]
    if len(filled) < len(ranked):
        notes.append(LEFT_OUT)
    if len(filled) < min(len(ranked), 2):
        return None, notes
    if pairs == "extremes" and len(ranked) > 1:
        (best, high), (worst, low) = filled[0], filled[-1]
        return Preference([best, worst], [float(high > low), 0.0]), notes
    return Preference([answer for answer, _ in filled], [score for _, score in filled]), notes


def _beginning(answer: Conversation) -> str:
    """The white space before an answer."""
    text = next((message["content"] for message in answer.messages if is_trained_answer(message)), "")
    return text[: len(text) - len(text.lstrip())]


def _stripped(answer: Conversation, keeps_beginning: bool) -> Conversation:
    strip = str.rstrip if keeps_beginning else str.strip
    messages = [m | {"content": strip(m["content"])} if is_trained_answer(m) else m for m in answer.messages]
    return Conversation(messages, answer.tools)


def join_answers(rendered: list[tuple[np.ndarray, np.ndarray]], scores: list[float]) -> Tree:
    """The tree of conversations, each its ids and loss mask, that begin with the same prompt.

    What follows the last trained token of each is cut off. The prompt is what all have in common before the first
    trained token of any. Of branches that are alike, the first is kept.

    Raises:
        UserError: they have no beginning in common.
    """
    ends = [int(np.flatnonzero(trained)[-1]) + 1 if trained.any() else 0 for _, trained in rendered]
    ids_of_first = rendered[0][0]
    if not all(ends):
        return Tree(ids_of_first, np.zeros(len(ids_of_first), bool), [], [], "nothing to train on")
    border = min(int(trained.argmax()) for _, trained in rendered)
    for ids, _ in rendered[1:]:
        different = np.flatnonzero(ids[:border] != ids_of_first[:border])
        border = int(different[0]) if len(different) else border
    if border == 0:
        raise UserError("has answers without a prompt: their first tokens differ; fix or remove the row")
    branches = {}
    for (ids, trained), end, score in zip(rendered, ends, scores, strict=True):
        branch = ids[border:end], trained[border:end]
        branches.setdefault(tuple(part.tobytes() for part in branch), (*branch, score))
    kept = list(branches.values())
    scores_of_kept = [score for _, _, score in kept]
    dropped, notes = None, []
    if len(rendered) > 1 and len(kept) == 1:
        dropped = "identical answers"
    elif len(kept) > 1 and len(set(scores_of_kept)) == 1:
        dropped = "tie"
    else:
        if len(kept) < len(rendered):
            notes.append(REPEATED)
        if len(set(scores_of_kept)) < len(kept):
            notes.append(EQUAL)
    return Tree(
        ids=np.concatenate([ids_of_first[:border], *(ids for ids, _, _ in kept)]),
        trained=np.concatenate([np.zeros(border, bool), *(trained for _, trained, _ in kept)]),
        starts=np.cumsum([border, *(len(ids) for ids, _, _ in kept[:-1])]).tolist(),
        scores=scores_of_kept,
        dropped=dropped,
        notes=notes,
    )
