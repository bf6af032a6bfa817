"""Makes the small data sets of the examples: python examples/make_data.py [OUTPUT_DIR]

Rows have OpenOrca's columns and style (a system prompt from Orca's list, a question, an explained response), but every
question has one right answer that a program can check, and every response ends with "The answer is X.". Preference
pairs have orca_dpo_pairs' columns: such a response is chosen, and one of the kinds in REJECTED is not. The seed is
fixed, so every run writes the same files.
"""

import argparse
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

from tasks import FAMILIES, Worked

TRAIN_ROWS, EVAL_ROWS = 1000, 100
# of one family, convert, few questions are left
TRAIN_PAIRS, EVAL_PAIRS = 240, 80

# Table 2 of the Orca paper, spelled as published.
SYSTEM_PROMPTS = [
    "",
    "You are an AI assistant. Provide a detailed answer so user don’t need to search outside to understand the answer.",
    "You are an AI assistant. You will be given a task. You must generate a detailed and long answer.",
    "You are a helpful assistant, who always provide explanation. Think like you are answering to a five year old.",
    "You are an AI assistant that follows instruction extremely well. Help as much as you can.",
    "You are an AI assistant that helps people find information. Provide a detailed answer so user don’t need to "
    "search outside to understand the answer.",
    "You are an AI assistant. User will you give you a task. Your goal is to complete the task as faithfully as you "
    "can. While performing the task think step-by-step and justify your steps.",
    "You should describe the task and explain your answer. While answering a multiple choice question, first output "
    "the correct answer(s). Then explain why other answers are wrong. Think like you are answering to a five year old.",
    "Explain how you used the definition to come up with the answer.",
    "You are an AI assistant. You should describe the task and explain your answer. While answering a multiple choice "
    "question, first output the correct answer(s). Then explain why other answers are wrong. You might need to use "
    "additional knowledge to answer the question.",
    "You are an AI assistant that helps people find information. User will you give you a question. Your task is to "
    "answer as faithfully as you can. While answering think step-by-step and justify your answer.",
    "User will you give you a task with some instruction. Your job is follow the instructions as faithfully as you "
    "can. While answering think step-by-step and justify your answer.",
    "You are a teacher. Given a task, you explain in simple steps what the task is asking, any guidelines it provides "
    "and how to use those guidelines to find the answer.",
    "You are an AI assistant, who knows every language and how to translate one language to another. Given a task, you "
    "explain in simple steps what the task is asking, any guidelines that it provides. You solve the task and show how "
    "you used the guidelines to solve the task.",
    "Given a definition of a task and a sample input, break the definition into small parts.\nEach of those parts will "
    "have some instruction. Explain their meaning by showing an example that meets the criteria in the instruction. "
    "Use the following format:\nPart  # : a key part of the definition.\nUsage: Sample response that meets the "
    "criteria from the key part. Explain why you think it meets the criteria.",
    "You are an AI assistant that helps people find information.",
]
# Which of them (counted from 1, as in the paper) go with which part of FLAN.
SUBMIXES = {"flan": [3, 4, 7, 8, 10], "cot": [6, 11, 16], "niv": [1, 2, 5, 7, 9, 12, 13, 14, 15], "t0": [1, 2, 3, 5, 7]}

ENDINGS = [
    'End with "The answer is ...".',
    'Finish with "The answer is" and the answer.',
    'Explain, then write "The answer is ...".',
]


def draw_tasks(
    number: int, rng: random.Random, asked: set[str]
) -> Iterator[tuple[str, str, str, Worked, list[Worked]]]:
    """Tasks of every family in turn, whose questions are not in `asked` yet: submix, system prompt, question with an
    ending, the right worked answer, and those with a slip.
    """
    for family in itertools.islice(itertools.cycle(FAMILIES), number):
        question, right, slips = family(rng)
        while question in asked:
            question, right, slips = family(rng)
        asked.add(question)
        submix = FAMILIES[family]
        prompts = [SYSTEM_PROMPTS[which - 1] for which in SUBMIXES[submix]]
        # Long prompts are rare: they cost training time and teach nothing here.
        brevity = [1 / (40 + len(prompt)) for prompt in prompts]
        system = rng.choices(prompts, brevity)[0]
        wrong = [slip for slip in slips if slip.answer != right.answer]
        yield submix, system, f"{question}\n{rng.choice(ENDINGS)}", right, wrong


def make_rows(number: int, rng: random.Random, asked: set[str]) -> list[dict[str, str]]:
    """Rows with OpenOrca's columns, shuffled."""
    rows = [
        {"id": f"{submix}.{len(asked)}", "system_prompt": system, "question": question, "response": str(right)}
        for submix, system, question, right, _ in draw_tasks(number, rng, asked)
    ]
    rng.shuffle(rows)
    return rows


# Answers that are rejected, of a right one and one with a slip, and how often each is drawn. Shorter and longer ones
# are balanced, so that length does not say which answer is better.
REJECTED = {
    "slip": (10, lambda right, wrong: str(wrong)),
    "no steps": (2, lambda right, wrong: f"The answer is {wrong.answer}."),
    "unfinished": (2, lambda right, wrong: right.steps),
    "changed": (6, lambda right, wrong: f"{right} No, that is wrong. The answer is {wrong.answer}."),
}


def make_pairs(number: int, rng: random.Random, asked: set[str]) -> list[dict[str, str]]:
    """Preference pairs with orca_dpo_pairs' columns, shuffled."""
    kinds = [reject for times, reject in REJECTED.values() for _ in range(times)]
    pairs = [
        {
            "system": system,
            "question": question,
            "chosen": str(right),
            "rejected": rng.choice(kinds)(right, rng.choice(wrong)),
        }
        for _, system, question, right, wrong in draw_tasks(number, rng, asked)
    ]
    rng.shuffle(pairs)
    return pairs


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, nargs="?", default=Path(__file__).parent / "data", metavar="OUTPUT_DIR")
    output = parser.parse_args(arguments).output
    output.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    asked: set[str] = set()
    for name, make, number in [
        ("train", make_rows, TRAIN_ROWS),
        ("eval", make_rows, EVAL_ROWS),
        ("preference_train", make_pairs, TRAIN_PAIRS),
        ("preference_eval", make_pairs, EVAL_PAIRS),
    ]:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in make(number, rng, asked)]
        (output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
        print(f"wrote {output / name}.jsonl: {number} rows")


if __name__ == "__main__":
    main()
