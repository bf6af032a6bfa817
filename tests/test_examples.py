"""The committed example data is what its generator makes, and its answers are right."""

import json
import re
import runpy
from types import SimpleNamespace

from tests.helpers import ROOT

EXAMPLES = ROOT / "examples"
# examples/ is not a package
make_data = SimpleNamespace(**runpy.run_path(str(EXAMPLES / "make_data.py")))


def rows(name):
    return [json.loads(line) for line in (EXAMPLES / "data" / name).read_text(encoding="utf-8").splitlines()]


TRAIN, EVAL = rows("train.jsonl"), rows("eval.jsonl")


def answer_again(question):
    """The answer, computed from the question's text alone and in another way than the generator does."""
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
        ordinals: list[str] = ["first", "second", "third", "fourth", "fifth"]
        return words[ordinals.index(ordinal[1])]
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
        week = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
        return week[(week.index(days[0]) + numbers[0]) % 7]
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
    train, held_out = [{row["question"].rsplit("\n", 1)[0] for row in part} for part in (TRAIN, EVAL)]
    assert len(train) == 1000 and len(held_out) == 100
    # the questions without their endings
    assert not train & held_out


def test_the_last_answer_counts():
    assert make_data.extract_answer("The answer is 3. No: The answer is a, b.") == "a, b"
    assert make_data.extract_answer("I do not know.") is None
