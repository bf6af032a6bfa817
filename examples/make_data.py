"""Makes the small instruction set of the quickstart: python examples/make_data.py [OUTPUT_DIR]

Rows have OpenOrca's columns and its manner (a system prompt from Orca's list, a question, an explained response), but
every question has one right answer that a program can check, and every response ends with "The answer is X.". The seed
is fixed: the same files come out every time.
"""

import argparse
import json
import random
import re
from pathlib import Path

TRAIN_ROWS, EVAL_ROWS = 1000, 100

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
WEEK = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
NAMES = "Anna Ben Carla David Emma Frank Grace Henry Irene Jack Laura Maria Nina Oscar Paul Rosa Sam Tom".split()
GROUPS = {
    "fruit": "apple banana cherry grape lemon mango orange peach pear plum".split(),
    "animal": "bear cow dog fox goat horse lion mouse rabbit tiger".split(),
    "color": "black blue brown green pink purple red white yellow gray".split(),
    "tool": "hammer saw drill wrench shovel rake ladder brush axe nail".split(),
    "instrument": "piano violin guitar drum flute trumpet cello harp banjo organ".split(),
    "vehicle": "car bus train bicycle truck boat plane tractor van ship".split(),
}
WORDS = [word for words in GROUPS.values() for word in words]
ORDINALS = ["first", "second", "third", "fourth", "fifth"]
UNITS = [
    ("week", "days", 7),
    ("hour", "minutes", 60),
    ("year", "months", 12),
    ("meter", "centimeters", 100),
    ("kilogram", "grams", 1000),
    ("decade", "years", 10),
]


# Each family takes a random generator and returns (question, steps, answer). The steps first say what is asked and then
# go through the input from left to right: that is what a small model learns in a few dozen steps.


def reverse(rng):
    words = rng.sample(WORDS, rng.randint(3, 4))
    listed = ", ".join(words)
    question = rng.choice(
        [
            f"In this task, you are given a list of words. Write the list in reverse order.\nInput: {listed}",
            f"Turn this list around so that the last word comes first: {listed}.",
            f"Given the words {listed}, write them from last to first.",
        ]
    )
    numbered = [f"{i} {word}" for i, word in enumerate(words, 1)]
    steps = f"Reverse the list. Forwards: {', '.join(numbered)}. Backwards: {', '.join(numbered[::-1])}."
    return question, steps, ", ".join(words[::-1])


def pick(rng):
    words = rng.sample(WORDS, 5)
    position = rng.randint(1, 5)
    listed, ordinal = ", ".join(words), ORDINALS[position - 1]
    question = rng.choice(
        [
            f"Read the list and tell me its {ordinal} word: {listed}.",
            f"What is the {ordinal} word of this list?\n{listed}",
            f"You are given five words. Your job is to output the {ordinal} word.\nInput: {listed}",
        ]
    )
    numbered = ", ".join(f"{i} {word}" for i, word in enumerate(words[:position], 1))
    return question, f"The {ordinal} word is number {position}. Count to {position}: {numbered}.", words[position - 1]


def replace(rng):
    old, new, *others = rng.sample(WORDS, 5)
    words = [old, *others]
    rng.shuffle(words)
    listed = " ".join(words)
    question = rng.choice(
        [
            f'Replace "{old}" by "{new}" in this text: {listed}',
            f'Copy the text, but write "{new}" where it says "{old}".\n{listed}',
            f"In this task, you substitute one word of a text.\nText: {listed}\nOld word: {old}\nNew word: {new}",
        ]
    )
    steps = ", ".join(f"{word} becomes {new}" if word == old else f"{word} stays" for word in words)
    return question, f"Replace {old}: {steps}.", " ".join(new if word == old else word for word in words)


def initials(rng):
    words = rng.sample(WORDS, rng.randint(3, 4))
    listed = " ".join(words)
    question = rng.choice(
        [
            f"Write the first letter of each of these words: {listed}.",
            f"In this task, you are given words. Output the first letter of every word.\nInput: {listed}",
            f"Which letters do these words start with?\n{listed}",
        ]
    )
    letters = [f"{word} starts with {word[0]}" for word in words]
    return question, f"First letters: {', '.join(letters)}.", ", ".join(word[0] for word in words)


def weekday(rng):
    start, steps = rng.randrange(7), rng.randint(2, 6)
    day = WEEK[start]
    question = rng.choice(
        [
            f"Today is {day}. Which day of the week will it be in {steps} days?",
            f"What day comes {steps} days after {day}?",
            f"{rng.choice(NAMES)} leaves on a {day} and comes back {steps} days later. On which day is that?",
        ]
    )
    path = [WEEK[(start + i) % 7] for i in range(1, steps + 1)]
    counted = ", ".join(f"{i} {name}" for i, name in enumerate(path, 1))
    return question, f"Count {steps} days from {day}: {counted}.", path[-1]


def story(rng):
    name, thing = rng.choice(NAMES), rng.choice("apples pears plums books coins marbles pencils stamps".split())
    have, more = rng.randint(2, 9), rng.randint(2, 9)
    total, less = have + more, rng.randint(1, 5)
    question = rng.choice(
        [
            f"{name} has {have} {thing}, buys {more} more and gives away {less}. How many {thing} are left?",
            f"There are {have} {thing} in a box. {name} puts in {more} and takes out {less}. "
            "How many are in the box now?",
            f"{name} found {have} {thing} on Monday and {more} on Tuesday, then lost {less}. How many {thing} remain?",
        ]
    )
    return question, f"First {have} + {more} = {total}. Then {total} - {less} = {total - less}.", str(total - less)


def convert(rng):
    unit, parts, factor = rng.choice(UNITS)
    number = rng.randint(2, 9)
    question = rng.choice(
        [
            f"How many {parts} are in {number} {unit}s?",
            f"Convert {number} {unit}s to {parts}.",
            f"One {unit} has {factor} {parts}. How many {parts} do {number} {unit}s have?",
        ]
    )
    product = number * factor
    return question, f"One {unit} is {factor} {parts}, so {number} x {factor} = {product}.", str(product)


def odd_one(rng):
    group, other = rng.sample(sorted(GROUPS), 2)
    odd = rng.choice(GROUPS[other])
    words = [(word, group) for word in rng.sample(GROUPS[group], 3)]
    words.insert(rng.randrange(4), (odd, other))
    options = "\n".join(f"- {word}" for word, _ in words)
    question = rng.choice(
        [
            f"Which word does not belong with the others?\nOPTIONS:\n{options}",
            f"Three of these belong together and one does not. Find the one.\nOPTIONS:\n{options}",
            f"Pick the odd one out.\n{options}",
        ]
    )
    kinds = ", ".join(f"{word}: {kind}" for word, kind in words)
    return question, f"The kinds are {kinds}. Most are {group}, only {odd} is {other}.", odd


def owner(rng):
    names = rng.sample(NAMES, 3)
    things = rng.sample([word for word in WORDS if word not in GROUPS["color"]], 3)
    verb, chosen = rng.choice(["has", "wants", "bought", "drew"]), rng.randrange(3)
    facts = [f"{name} {verb} the {thing}" for name, thing in zip(names, things)]
    text = ". ".join(facts)
    question = rng.choice(
        [
            f"{text}.\n\nWho {verb} the {things[chosen]}?",
            f"Read the text and answer: who {verb} the {things[chosen]}?\n{text}.",
            f"Passage: {text}.\nQuestion: Which person {verb} the {things[chosen]}?",
        ]
    )
    read = ", ".join(f"{fact} {'yes' if i == chosen else 'no'}" for i, fact in enumerate(facts[: chosen + 1]))
    return question, f"Look for the {things[chosen]}: {read}.", names[chosen]


def largest(rng):
    numbers = rng.sample(range(10, 100), 3)
    listed = ", ".join(map(str, numbers))
    question = rng.choice(
        [
            f"What is the largest of these numbers? {listed}",
            f"Find the maximum of {listed}.",
            f"You are given a list of numbers and must output the biggest one.\nInput: {listed}",
        ]
    )
    best, steps = numbers[0], []
    for number in numbers[1:]:
        steps.append(f"{number} or {best}: {max(best, number)}")
        best = max(best, number)
    return question, f"Start with {numbers[0]}. {', '.join(steps)}.", str(best)


FAMILIES = {
    reverse: "niv",
    pick: "niv",
    replace: "niv",
    initials: "niv",
    weekday: "cot",
    story: "cot",
    convert: "cot",
    odd_one: "flan",
    owner: "t0",
    largest: "t0",
}


def extract_answer(text: str) -> str | None:
    """The X of the text's last "The answer is X.", or None."""
    found = re.findall(r"The answer is ([^.\n]+)", text)
    return found[-1].strip() if found else None


def make_rows(number: int, rng: random.Random, asked: set[str]) -> list[dict[str, str]]:
    """Rows of every family in turn, whose questions are not in `asked` yet, shuffled."""
    rows = []
    while len(rows) < number:
        family = list(FAMILIES)[len(rows) % len(FAMILIES)]
        question, steps, answer = family(rng)
        if question in asked:
            continue
        asked.add(question)
        submix = FAMILIES[family]
        prompts = [SYSTEM_PROMPTS[which - 1] for which in SUBMIXES[submix]]
        # long ones, which take more time to train on, are rare
        brevity = [1 / (40 + len(prompt)) for prompt in prompts]
        rows.append(
            {
                "id": f"{submix}.{len(asked)}",
                "system_prompt": rng.choices(prompts, brevity)[0],
                "question": f"{question}\n{rng.choice(ENDINGS)}",
                "response": f"{steps} The answer is {answer}.",
            }
        )
    rng.shuffle(rows)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Makes the small instruction set of the quickstart.")
    parser.add_argument("output", type=Path, nargs="?", default=Path(__file__).parent / "data", metavar="OUTPUT_DIR")
    output = parser.parse_args(arguments).output
    output.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    asked: set[str] = set()
    for name, number in [("train", TRAIN_ROWS), ("eval", EVAL_ROWS)]:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in make_rows(number, rng, asked)]
        (output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
        print(f"wrote {output / name}.jsonl: {number} rows")


if __name__ == "__main__":
    main()
