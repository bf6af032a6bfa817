"""The kinds of questions of the example data: each has one right answer that a program can check."""

import random
import re
from collections.abc import Callable
from typing import NamedTuple

WEEK = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
NAMES = "Anna Ben Carla David Emma Frank Grace Henry Irene Jack Laura Maria Nina Oscar Paul Rosa Sam Tom".split()
GROUPS = {
    "fruit": ["apple", "banana", "cherry", "grape", "lemon", "mango", "orange", "peach", "pear", "plum"],
    "animal": ["bear", "cow", "dog", "fox", "goat", "horse", "lion", "mouse", "rabbit", "tiger"],
    "color": ["black", "blue", "brown", "green", "pink", "purple", "red", "white", "yellow", "gray"],
    "tool": ["hammer", "saw", "drill", "wrench", "shovel", "rake", "ladder", "brush", "axe", "nail"],
    "instrument": ["piano", "violin", "guitar", "drum", "flute", "trumpet", "cello", "harp", "banjo", "organ"],
    "vehicle": ["car", "bus", "train", "bicycle", "truck", "boat", "plane", "tractor", "van", "ship"],
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


class Worked(NamedTuple):
    """A worked answer: the steps first say what is asked and then go through the input from left to right, which is
    what a small model learns in a few dozen steps.
    """

    steps: str
    answer: str

    def __str__(self) -> str:
        return f"{self.steps} The answer is {self.answer}."


# A question, the right worked answer, and some with a slip: one step is wrong or left out, and what follows is made of
# it. A slip may make no difference to the answer.
Task = tuple[str, Worked, list[Worked]]


def without_one(items: list) -> list[list]:
    """A list without its first item, without its second, and so on."""
    return [items[:i] + items[i + 1 :] for i in range(len(items))]


def numbered(words: list[str]) -> str:
    return ", ".join(f"{i} {word}" for i, word in enumerate(words, 1))


def reverse(rng: random.Random) -> Task:
    words = rng.sample(WORDS, rng.randint(3, 4))
    listed = ", ".join(words)
    question = rng.choice(
        [
            f"In this task, you are given a list of words. Write the list in reverse order.\nInput: {listed}",
            f"Turn this list around so that the last word comes first: {listed}.",
            f"Given the words {listed}, write them from last to first.",
        ]
    )

    def work(backwards: list[str]) -> Worked:
        counted = ", ".join(f"{words.index(word) + 1} {word}" for word in backwards)
        steps = f"Reverse the list. Forwards: {numbered(words)}. Backwards: {counted}."
        return Worked(steps, ", ".join(backwards))

    right = words[::-1]
    swapped = [[*right[:i], right[i + 1], right[i], *right[i + 2 :]] for i in range(len(right) - 1)]
    return question, work(right), [work(wrong) for wrong in (*swapped, *without_one(right))]


def pick(rng: random.Random) -> Task:
    words = rng.sample(WORDS, 5)
    position = rng.randint(1, 5)
    listed = ", ".join(words)
    ordinal = ORDINALS[position - 1]
    question = rng.choice(
        [
            f"Read the list and tell me its {ordinal} word: {listed}.",
            f"What is the {ordinal} word of this list?\n{listed}",
            f"You are given five words. Your job is to output the {ordinal} word.\nInput: {listed}",
        ]
    )

    def work(counted: list[str]) -> Worked:
        return Worked(
            f"The {ordinal} word is number {position}. Count to {position}: {numbered(counted)}.", counted[-1]
        )

    skipped = [rest[:position] for rest in without_one(words)]
    twice = [[*words[:i], *words[i - 1 : position - 1]] for i in range(1, position)]
    return question, work(words[:position]), [work(wrong) for wrong in (*skipped, *twice)]


def replace(rng: random.Random) -> Task:
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

    def work(replaced: set[str]) -> Worked:
        steps = ", ".join(f"{word} becomes {new}" if word in replaced else f"{word} stays" for word in words)
        return Worked(f"Replace {old}: {steps}.", " ".join(new if word in replaced else word for word in words))

    slips = [work(wrong) for other in others for wrong in ({other}, {old, other})]
    return question, work({old}), [*slips, work(set())]


def initials(rng: random.Random) -> Task:
    words = rng.sample(WORDS, rng.randint(3, 4))
    listed = " ".join(words)
    question = rng.choice(
        [
            f"Write the first letter of each of these words: {listed}.",
            f"In this task, you are given words. Output the first letter of every word.\nInput: {listed}",
            f"Which letters do these words start with?\n{listed}",
        ]
    )

    def work(read: list[tuple[str, str]]) -> Worked:
        steps = ", ".join(f"{word} starts with {letter}" for word, letter in read)
        return Worked(f"First letters: {steps}.", ", ".join(letter for _, letter in read))

    right = [(word, word[0]) for word in words]
    misread = [[*right[:i], (word, word[1]), *right[i + 1 :]] for i, word in enumerate(words)]
    return question, work(right), [work(wrong) for wrong in (*misread, *without_one(right))]


def weekday(rng: random.Random) -> Task:
    start = rng.randrange(7)
    steps = rng.randint(2, 6)
    day = WEEK[start]
    question = rng.choice(
        [
            f"Today is {day}. Which day of the week will it be in {steps} days?",
            f"What day comes {steps} days after {day}?",
            f"{rng.choice(NAMES)} leaves on a {day} and comes back {steps} days later. On which day is that?",
        ]
    )

    def work(path: list[str]) -> Worked:
        return Worked(f"Count {steps} days from {day}: {numbered(path)}.", path[-1])

    path = [WEEK[(start + i) % 7] for i in range(steps + 2)]
    # the first day counted too, one left out, and one too many or too few
    skipped = [path[1:i] + path[i + 1 :] for i in range(1, steps + 1)]
    return question, work(path[1:-1]), [work(wrong) for wrong in (path[:-2], *skipped, path[1:], path[1:-2])]


def story(rng: random.Random) -> Task:
    name = rng.choice(NAMES)
    thing = rng.choice(["apples", "pears", "plums", "books", "coins", "marbles", "pencils", "stamps"])
    have, more = rng.randint(2, 9), rng.randint(2, 9)
    total = have + more
    less = rng.randint(1, 5)
    question = rng.choice(
        [
            f"{name} has {have} {thing}, buys {more} more and gives away {less}. How many {thing} are left?",
            f"There are {have} {thing} in a box. {name} puts in {more} and takes out {less}. "
            "How many are in the box now?",
            f"{name} found {have} {thing} on Monday and {more} on Tuesday, then lost {less}. How many {thing} remain?",
        ]
    )

    def work(total: int, sign: str, left: int) -> Worked:
        return Worked(f"First {have} + {more} = {total}. Then {total} {sign} {less} = {left}.", str(left))

    slips = [work(wrong, "-", wrong - less) for wrong in (total - 1, total + 1)]
    slips += [work(total, "-", total - less - 1), work(total, "-", total - less + 1), work(total, "+", total + less)]
    return question, work(total, "-", total - less), [*slips, Worked(f"It is {have} + {more} = {total}.", str(total))]


def convert(rng: random.Random) -> Task:
    unit, parts, factor = rng.choice(UNITS)
    number = rng.randint(2, 9)
    question = rng.choice(
        [
            f"How many {parts} are in {number} {unit}s?",
            f"Convert {number} {unit}s to {parts}.",
            f"One {unit} has {factor} {parts}. How many {parts} do {number} {unit}s have?",
        ]
    )

    def work(factor: int, product: int) -> Worked:
        return Worked(f"One {unit} is {factor} {parts}, so {number} x {factor} = {product}.", str(product))

    misremembered = [work(other, number * other) for *_, other in UNITS]
    miscounted = [work(factor, (number + i) * factor) for i in (-1, 1)]
    return question, work(factor, number * factor), [*misremembered, *miscounted, work(factor, number + factor)]


def odd_one(rng: random.Random) -> Task:
    group, other = rng.sample(sorted(GROUPS), 2)
    odd = rng.choice(GROUPS[other])
    words = rng.sample(GROUPS[group], 3)
    words.insert(rng.randrange(4), odd)
    options = "\n".join(f"- {word}" for word in words)
    question = rng.choice(
        [
            f"Which word does not belong with the others?\nOPTIONS:\n{options}",
            f"Three of these belong together and one does not. Find the one.\nOPTIONS:\n{options}",
            f"Pick the odd one out.\n{options}",
        ]
    )

    def work(odd: str) -> Worked:
        kinds = ", ".join(f"{word}: {other if word == odd else group}" for word in words)
        return Worked(f"The kinds are {kinds}. Most are {group}, only {odd} is {other}.", odd)

    return question, work(odd), [work(word) for word in words]


def owner(rng: random.Random) -> Task:
    names = rng.sample(NAMES, 3)
    things = rng.sample([word for word in WORDS if word not in GROUPS["color"]], 3)
    verb = rng.choice(["has", "wants", "bought", "drew"])
    chosen = rng.randrange(3)
    facts = [f"{name} {verb} the {thing}" for name, thing in zip(names, things)]
    text = ". ".join(facts)
    question = rng.choice(
        [
            f"{text}.\n\nWho {verb} the {things[chosen]}?",
            f"Read the text and answer: who {verb} the {things[chosen]}?\n{text}.",
            f"Passage: {text}.\nQuestion: Which person {verb} the {things[chosen]}?",
        ]
    )

    def work(found: int) -> Worked:
        read = ", ".join(f"{fact} {'yes' if i == found else 'no'}" for i, fact in enumerate(facts[: found + 1]))
        return Worked(f"Look for the {things[chosen]}: {read}.", names[found])

    return question, work(chosen), [work(found) for found in range(3)]


def largest(rng: random.Random) -> Task:
    numbers = rng.sample(range(10, 100), 3)
    listed = ", ".join(map(str, numbers))
    question = rng.choice(
        [
            f"What is the largest of these numbers? {listed}",
            f"Find the maximum of {listed}.",
            f"You are given a list of numbers and must output the biggest one.\nInput: {listed}",
        ]
    )

    def work(*choices) -> Worked:
        best = numbers[0]
        steps = []
        for number, choose in zip(numbers[1:], choices):
            chosen = choose(best, number)
            steps.append(f"{number} or {best}: {chosen}")
            best = chosen
        return Worked(f"Start with {numbers[0]}. {', '.join(steps)}.", str(best))

    # a wrong comparison, or one left out
    return question, work(max, max), [work(min, max), work(max, min), work(max)]


# Every kind of question, and the part of FLAN that it is like.
FAMILIES: dict[Callable[[random.Random], Task], str] = {
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
