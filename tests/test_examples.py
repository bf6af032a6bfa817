"""The committed example data equals the generator's output, and its answers are correct."""

import importlib.util
import json
import re
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"
SPEC = importlib.util.spec_from_file_location("make_data", EXAMPLES / "make_data.py")
assert SPEC and SPEC.loader
make_data = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make_data)


ORDINALS = ["first", "second", "third", "fourth", "fifth"]
WEEK = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def rows(name):
    return [json.loads(line) for line in (EXAMPLES / "data" / name).read_text(encoding="utf-8").splitlines()]


TRAIN, EVAL = rows("train.jsonl"), rows("eval.jsonl")


def answer_again(question):
    """The answer from the question's text alone, computed independently of the generator."""
    task, _ = question.rsplit("\n", 1)
    words = [word for word in re.findall(r"[a-z]+", task) if word in make_data.WORDS]
    numbers = [int(number) for number in re.findall(r"\d+", task)]
    owners = {
        thing: name
        for name, thing in re.findall(r"(\w+) (?:has|wants|bought|drew) the (\w+)", task)
        if name in make_data.NAMES
    }
    days = re.findall(r"[A-Z]\w+day\b", task.replace("Today", ""))
    if re.search("reverse|around|last to first", task):
        return ", ".join(reversed(words))
    if ordinal := re.search("(first|second|third|fourth|fifth) (?:word|one)", task):
        return words[ORDINALS.index(ordinal[1])]
    if re.search("Replace|Copy|substitute", task):
        (old,) = {word for word in words if words.count(word) == 2}
        text = words[:4] if "Text:" in task else words[2:]
        (new,) = set(words) - set(text)
        return re.sub(rf"\b{old}\b", new, " ".join(text))
    if "letter" in task:
        return ", ".join(word[0] for word in words)
    if re.search("belong|odd", task):
        kind = {word: group for group, members in make_data.GROUPS.items() for word in members}
        (odd,) = [word for word in words if sum(kind[other] == kind[word] for other in words) == 1]
        return odd
    if re.search("largest|maximum|biggest", task):
        return str(sorted(numbers)[-1])
    if owners:
        (asked,) = {word for word in words if words.count(word) == 2}
        return owners[asked]
    if re.search("buys|puts in|lost", task):
        have, more, less = numbers
        return str(have + more - less)
    if days:
        return WEEK[(WEEK.index(days[0]) + numbers[0]) % 7]
    (factor,) = [factor for unit, parts, factor in make_data.UNITS if unit in task and parts in task]
    return str(factor * numbers[-1])


def test_the_files_are_what_the_generator_makes(tmp_path):
    make_data.main([str(tmp_path)])
    for name in ["train.jsonl", "eval.jsonl"]:
        assert (tmp_path / name).read_bytes() == (EXAMPLES / "data" / name).read_bytes()


def test_every_answer_is_right():
    for row in TRAIN + EVAL:
        assert make_data.extract_answer(row["response"]) == answer_again(row["question"]), row


def test_columns_ids_and_system_prompts_are_openorcas():
    for row in TRAIN + EVAL:
        assert list(row) == ["id", "system_prompt", "question", "response"]
        assert all(isinstance(value, str) for value in row.values())
        assert re.fullmatch(r"(flan|cot|niv|t0)\.\d+", row["id"])
        assert row["system_prompt"] in make_data.SYSTEM_PROMPTS
    assert len({row["id"] for row in TRAIN + EVAL}) == len(TRAIN + EVAL)
    assert len(set(make_data.SYSTEM_PROMPTS)) == 16 and "" in {row["system_prompt"] for row in TRAIN}


def test_no_held_out_question_was_trained_on():
    # without the last line, which only says how to phrase the answer
    train, held_out = [{row["question"].rsplit("\n", 1)[0] for row in part} for part in (TRAIN, EVAL)]
    assert len(train) == 1000 and len(held_out) == 100 and not train & held_out


def test_the_last_answer_counts():
    assert make_data.extract_answer("The answer is 3. No: The answer is a, b.") == "a, b"
    assert make_data.extract_answer("I do not know.") is None
