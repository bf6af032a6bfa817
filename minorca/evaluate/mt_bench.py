"""MT-Bench (Zheng et al. 2023, arXiv:2306.05685): questions of two turns, answered by our engine, rated by a judge.

Files are FastChat's (fastchat/llm_judge): question.jsonl and judge_prompts.jsonl are the user's, for no package has
them; answers go to model_answer/NAME.jsonl and judgments to model_judgment/JUDGE_single.jsonl, which FastChat's
show_result reads. Both files grow line by line, and an interrupted run goes on with what is missing.

Temperatures, number of tokens and which prompt judges what are FastChat's. Where it seeds torch, we seed each request,
so that an answer does not depend on the others.
"""

import hashlib
import json
import math
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from minorca.data.chat_template import render_chat
from minorca.data.tokenizer import Tokenizer
from minorca.errors import UserError, raise_problems
from minorca.evaluate.judge import NO_RATING, Judge, Match, append_line, read_lines, read_prompts, read_records
from minorca.evaluate.published import MT_BENCH_MEAN
from minorca.evaluate.suites import MT_BENCH, Score, SuiteResult
from minorca.files.safe_io import quote
from minorca.generate.engine import Engine
from minorca.generate.request import Request, default_max_length
from minorca.generate.sampling import Sampling
from minorca.model.network import Mistral
from minorca.progress import progress_bar

TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
# Of questions of another category.
TEMPERATURE = 0.7
# transformers' default, which FastChat's generation leaves as it is
TOP_K = 50
MAX_NEW_TOKENS = 1024
# What answers are drawn by.
GENERATION = {"temperatures": TEMPERATURES, "other": TEMPERATURE, "top_k": TOP_K, "max_new_tokens": MAX_NEW_TOKENS}
# Questions that are answered at once, by type of device: fixed, because an answer's bits depend on it.
SLOTS = {"cuda": 32, "cpu": 8}
# Categories that are judged against a reference answer.
WITH_REFERENCE = ("math", "reasoning", "coding")
REFERENCES = "reference_answer"


@dataclass(frozen=True)
class Question:
    """Attributes:
    references: an answer a turn, where the category is judged against them; else none.
    """

    id: int
    category: str
    turns: list[str]
    references: list[str]

    def identify(self, model: str) -> str:
        """What the answers of a model to this question are found by."""
        return hashlib.sha256(json.dumps([model, self.category, self.turns]).encode()).hexdigest()

    def matches(self, answer: dict[str, Any]) -> Iterator[Match]:
        """What the judge is asked about an answer: its first turn, and the second with the first."""
        turns = answer["choices"][0]["turns"]
        kind = "single-math-v1" if self.references else "single-v1"
        references = {f"ref_answer_{turn}": text for turn, text in enumerate(self.references, 1)}
        first = {"question": self.turns[0], "answer": turns[0]}
        if self.references:
            first["ref_answer_1"] = self.references[0]
        yield Match(self.id, 1, kind, first)
        if len(self.turns) == 2:
            both = {f"question_{turn}": text for turn, text in enumerate(self.turns, 1)}
            both |= {f"answer_{turn}": text for turn, text in enumerate(turns, 1)}
            yield Match(self.id, 2, f"{kind}-multi-turn", both | references)


@dataclass(frozen=True)
class MTBench:
    """The questions, and who judges the answers."""

    questions: list[Question]
    judge: Judge

    @classmethod
    def read(
        cls, questions: Path, judge: str, judge_prompts: Path, judge_model: str, limit: int | None = None
    ) -> "MTBench":
        """Reads FastChat's files.

        Args:
            questions: question.jsonl. Reference answers are read from the directory reference_answer beside it
                (JUDGE.jsonl, or gpt-4.jsonl), as FastChat does, else from the questions' `reference`.
            judge: the URL of an OpenAI-compatible endpoint.
            judge_prompts: judge_prompts.jsonl.
            judge_model: what the endpoint calls the judge.
            limit: how many of the questions; None: all.

        Raises:
            UserError: a file is missing or has another schema, with the line and field; an invalid URL.
        """
        read = read_questions(questions, judge_model)[:limit]
        return cls(read, Judge(judge, judge_model, read_prompts(judge_prompts)))

    def evaluate(
        self,
        model: Mistral,
        tok: Tokenizer,
        template: str,
        directory: Path,
        name: str,
        identity: str,
        system: str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> SuiteResult:
        """Answers what is not answered yet, judges what is not judged yet, and averages.

        Args:
            directory: where model_answer and model_judgment are, or will be.
            name: the model's, in the names of files and in them.
            identity: what the answers follow from beside the question; those of another identity are refused.
            system: the system prompt, if any.

        Raises:
            UserError: answers of this name are another model's; a conversation is longer than the model; judgments did
                not come (`Judge.judge_all`).
        """
        file = directory / "model_answer" / f"{name}.jsonl"
        answers = read_answers(file, self.questions, identity)
        missing = [question for question in self.questions if question.id not in answers]
        if missing:
            for question, turns in answer_questions(model, tok, template, missing, system, max_new_tokens):
                answers[question.id] = {
                    "question_id": question.id,
                    "answer_id": uuid.uuid4().hex,
                    "model_id": name,
                    "choices": [{"index": 0, "turns": turns}],
                    "tstamp": time.time(),
                    "identity": question.identify(identity),
                }
                append_line(file, answers[question.id])
        matches = [match for question in self.questions for match in question.matches(answers[question.id])]
        # a judge's name may have slashes
        judged = directory / "model_judgment" / f"{self.judge.model.replace('/', '--')}_single.jsonl"
        return summarize(self.questions, self.judge.judge_all(matches, name, judged))


# ------------------------------------------------------------------------------------------------------------ questions


def read_questions(file: Path, judge_model: str) -> list[Question]:
    """Raises UserError for every question with another schema, with its line and field."""
    references = _read_references(file.parent / REFERENCES, judge_model)
    lines = list(read_records(file))
    if not lines:
        raise UserError("is empty; expected FastChat's question.jsonl", path=file)
    problems: list[UserError] = []
    questions: dict[int, Question] = {}
    for number, line in lines:
        found = references.get(str(line.get("question_id")), line.get("reference"))
        wrong = list(_question_problems(file, number, line, found, set(questions)))
        problems += wrong
        if not wrong:
            category, turns = line["category"], line["turns"]
            needed = found if category in WITH_REFERENCE and found else []
            questions[line["question_id"]] = Question(line["question_id"], category, turns, needed)
    raise_problems(problems)
    return list(questions.values())


def _question_problems(file: Path, number: int, line: dict, references: Any, seen: set[int]) -> Iterator[UserError]:
    def problem(field: str, expected: str) -> UserError:
        return UserError(
            f"is {quote(line.get(field))}; expected {expected}", path=file, where=f"line {number}", field=field
        )

    if not isinstance(line.get("question_id"), int):
        yield problem("question_id", "an integer")
    elif line["question_id"] in seen:
        yield problem("question_id", "one that no earlier line has")
    if not isinstance(line.get("category"), str):
        yield problem("category", f"one of {', '.join(TEMPERATURES)}, or another name")
    turns = line.get("turns")
    if not _texts(turns) or len(turns) not in (1, 2):
        yield problem("turns", "a list of one or two texts")
    elif line.get("category") in WITH_REFERENCE and (not _texts(references) or len(references) < len(turns)):
        expected = f"a reference answer a turn, here or in {file.parent / REFERENCES / 'gpt-4.jsonl'}"
        yield problem("reference", f"{expected}: {line['category']} is judged against them")


def _texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(text, str) for text in value)


def _read_references(directory: Path, judge_model: str) -> dict[str, list[str]]:
    """Reference answers by the question's id, in FastChat's format of answers."""
    for name in (judge_model.replace("/", "--"), "gpt-4"):
        file = directory / f"{name}.jsonl"
        if file.exists():
            return {str(line.get("question_id")): _turns_of(file, number, line) for number, line in read_records(file)}
    return {}


def _turns_of(file: Path, number: int, line: dict) -> list[str]:
    try:
        turns = line["choices"][0]["turns"]
    except (LookupError, TypeError):
        turns = None
    if not _texts(turns):
        message = f"is {quote(line.get('choices'))}; expected [{{index, turns: [TEXT, ..]}}]"
        raise UserError(message, path=file, where=f"line {number}", field="choices")
    return turns


# -------------------------------------------------------------------------------------------------------------- answers


def read_answers(file: Path, questions: Sequence[Question], identity: str) -> dict[int, dict[str, Any]]:
    """The answers that a file has, by question.

    Raises:
        UserError: one is another model's, or has not as many turns as its question.
    """
    asked = {question.id: question for question in questions}
    answers = {}
    for number, line in read_lines(file):
        where = f"line {number}"
        number_asked = line.get("question_id")
        question = asked.get(number_asked) if isinstance(number_asked, int) else None
        if question is None:
            continue
        if line.get("identity") != question.identify(identity):
            message = "is another model's, or of other settings; move the file away, or choose another name"
            raise UserError(message, path=file, where=where)
        if len(_turns_of(file, number, line)) != len(question.turns):
            message = f"has not {len(question.turns)} turns, as its question has"
            raise UserError(message, path=file, where=where, field="choices")
        answers[question.id] = line
    return answers


@dataclass(eq=False)
class _Conversation:
    question: Question
    messages: list[dict[str, str]]
    ids: list[int] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)


def answer_questions(
    model: Mistral,
    tok: Tokenizer,
    template: str,
    questions: Sequence[Question],
    system: str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Iterator[tuple[Question, list[str]]]:
    """Answers all turns of each question; yields its answers as soon as they are complete, in any order.

    The second turn's prompt has the first turn's answer. Texts are without control tokens and without white space at
    both ends. Near the model's maximum length an answer may have fewer tokens than `max_new_tokens`.

    Raises:
        UserError: a conversation leaves no room for an answer.
    """
    opening = [{"role": "system", "content": system}] if system else []
    limit = default_max_length(model.arch)
    prompts = [[*opening, *({"role": "user", "content": text} for text in q.turns)] for q in questions]
    # what the longest conversation can need; 1024 for the template, and for answers that are encoded to more tokens
    text = max(sum(len(tok.encode(message["content"])) for message in messages) for messages in prompts)
    slots = SLOTS[model.embedding.weight.device.type]
    engine = Engine(model, slots, min(limit, text + 2 * max_new_tokens + 1024))
    running: dict[Request, _Conversation] = {}

    def ask(conversation: _Conversation) -> None:
        question = conversation.question
        turn = question.turns[len(conversation.answers)]
        conversation.messages.append({"role": "user", "content": turn})
        conversation.ids = []
        prompt = render_chat(tok, conversation.messages, template=template)
        room = min(max_new_tokens, engine.max_length - len(prompt))
        if room < 1:
            raise UserError(f"question {question.id} has {len(prompt)} tokens; the model's maximum length is {limit}")
        sampling = Sampling(TEMPERATURES.get(question.category, TEMPERATURE), top_k=TOP_K, seed=0)
        request = Request(prompt, room, sampling, tok.stop_ids)
        running[request] = conversation
        engine.add(request)

    for question in questions:
        ask(_Conversation(question, [*opening]))
    with progress_bar("answering", len(questions), "questions") as progress:
        while engine.busy:
            for token in engine.step():
                conversation = running[token.request]
                conversation.ids.append(token.id)
                if not token.finish_reason:
                    continue
                del running[token.request]
                text = tok.decode([i for i in conversation.ids if i not in tok.stop_ids]).strip()
                conversation.answers.append(text)
                conversation.messages.append({"role": "assistant", "content": text})
                if len(conversation.answers) < len(conversation.question.turns):
                    ask(conversation)
                else:
                    progress.update()
                    yield conversation.question, conversation.answers


# --------------------------------------------------------------------------------------------------------------- scores


def summarize(questions: Sequence[Question], judgments: Sequence[dict[str, Any]]) -> SuiteResult:
    """The mean over all judgments, as FastChat's show_result computes it: those without a rating are left out.

    Standard errors are over questions: the ratings of one question's two turns are not independent.

    Raises:
        UserError: no judgment has a rating.
    """
    categories = {question.id: question.category for question in questions}
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for turn in (1, 2):
        groups[f"turn {turn}"] = [judgment for judgment in judgments if judgment["turn"] == turn]
    for judgment in judgments:
        groups[categories[judgment["question_id"]]].append(judgment)
    average = _score(MT_BENCH_MEAN, judgments)
    if average is None:
        raise UserError(
            "gave no rating in the form [[rating]] in any judgment; choose another model", field="--judge-model"
        )
    members = [_score(name, group) for name, group in groups.items()]
    return SuiteResult(MT_BENCH, "MT-Bench", [average], [score for score in members if score])


def _score(name: str, judgments: Sequence[dict[str, Any]]) -> Score | None:
    """The mean rating, with each question as one cluster for the standard error; None where nothing was rated."""
    ratings: dict[int, list[float]] = defaultdict(list)
    for judgment in judgments:
        if judgment["score"] != NO_RATING:
            ratings[judgment["question_id"]].append(judgment["score"])
    count = sum(map(len, ratings.values()))
    if not count:
        return None
    mean = math.fsum(rating for group in ratings.values() for rating in group) / count
    squares = math.fsum(math.fsum(rating - mean for rating in group) ** 2 for group in ratings.values())
    clusters = len(ratings)
    stderr = math.sqrt(squares * clusters / (clusters - 1)) / count if clusters > 1 else None
    unrated = f", {len(judgments) - count} without a rating" if count < len(judgments) else ""
    of = f"{clusters} question{'s' if clusters > 1 else ''}"
    return Score(name, mean, stderr, f"{count} judgments of {of}{unrated}", count, count)
