"""The committed example data is what its generator makes, and its answers are right."""

import json
import random
import re

import make_data
import pytest
import tasks

from tests.helpers import ROOT

EXAMPLES = ROOT / "examples"


def rows(name):
    return [json.loads(line) for line in (EXAMPLES / "data" / name).read_text(encoding="utf-8").splitlines()]


TRAIN, EVAL = rows("train.jsonl"), rows("eval.jsonl")
PAIRS = {name: rows(f"preference_{name}.jsonl") for name in ("train", "eval")}


def answer_again(question):
    """The answer, computed from the question's text alone and in another way than the generator does."""
    task, _ = question.rsplit("\n", 1)
    words = [word for word in re.findall(r"[a-z]+", task) if word in tasks.WORDS]
    numbers = [int(number) for number in re.findall(r"\d+", task)]
    owners = {
        thing: name
        for name, thing in re.findall(r"(\w+) (?:has|wants|bought|drew) the (\w+)", task)
        if name in tasks.NAMES
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
        kind = {word: group for group, members in tasks.GROUPS.items() for word in members}
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
    (factor,) = [factor for unit, parts, factor in tasks.UNITS if unit in task and parts in task]
    return str(factor * numbers[-1])


def test_the_files_are_what_the_generator_makes(tmp_path):
    make_data.main([str(tmp_path)])
    for name in ["train.jsonl", "eval.jsonl", "preference_train.jsonl", "preference_eval.jsonl"]:
        assert (tmp_path / name).read_bytes() == (EXAMPLES / "data" / name).read_bytes()


def test_every_answer_is_right():
    for row in TRAIN + EVAL:
        assert tasks.extract_answer(row["response"]) == answer_again(row["question"]), row


def test_columns_ids_and_system_prompts_are_openorcas():
    for row in TRAIN + EVAL:
        assert list(row) == ["id", "system_prompt", "question", "response"]
        assert all(isinstance(value, str) for value in row.values())
        assert re.fullmatch(r"(flan|cot|niv|t0)\.\d+", row["id"])
        assert row["system_prompt"] in make_data.SYSTEM_PROMPTS
    assert len({row["id"] for row in TRAIN + EVAL}) == len(TRAIN + EVAL)
    assert len(set(make_data.SYSTEM_PROMPTS)) == 16 and "" in {row["system_prompt"] for row in TRAIN}


def test_no_question_is_asked_twice():
    """The questions without their endings."""
    files = [TRAIN, EVAL, PAIRS["train"], PAIRS["eval"]]
    questions = [[row["question"].rsplit("\n", 1)[0] for row in part] for part in files]
    assert [len(part) for part in questions] == [1000, 100, 240, 80]
    assert len({question for part in questions for question in part}) == 1420


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_slips_are_answers_of_their_own(family):
    rng = random.Random(0)
    for _ in range(100):
        _, right, slips = family(rng)
        wrong = {str(slip) for slip in slips if slip.answer != right.answer}
        assert wrong and str(right) not in wrong
        assert not any(str(slip).startswith(right.steps) for slip in slips if slip.answer != right.answer)


@pytest.mark.parametrize("pairs", PAIRS.values(), ids=PAIRS)
def test_of_a_pair_the_chosen_answer_is_right_and_the_other_is_wrong_or_unfinished(pairs):
    kinds = dict.fromkeys(make_data.REJECTED, 0)
    for pair in pairs:
        assert list(pair) == ["system", "question", "chosen", "rejected"]
        assert pair["system"] in make_data.SYSTEM_PROMPTS
        chosen, rejected = pair["chosen"], pair["rejected"]
        right, found = answer_again(pair["question"]), tasks.extract_answer(rejected)
        assert tasks.extract_answer(chosen) == right, pair
        assert found != right, pair
        if found is None:
            kinds["unfinished"] += 1
            assert chosen == f"{rejected} The answer is {right}.", pair
        elif rejected == f"The answer is {found}.":
            kinds["no steps"] += 1
        elif rejected.startswith(chosen):
            kinds["changed"] += 1
        else:
            kinds["slip"] += 1
            steps = rejected.removesuffix(f" The answer is {found}.")
            assert steps != rejected and not chosen.startswith(steps), pair
        for text in (chosen, rejected):
            assert text == " ".join(text.split())
    assert all(kinds.values())


@pytest.mark.parametrize("pairs", PAIRS.values(), ids=PAIRS)
def test_length_does_not_say_which_answer_of_a_pair_is_better(pairs):
    chosen, rejected = ([len(pair[name]) for pair in pairs] for name in ("chosen", "rejected"))
    assert sum(chosen) == pytest.approx(sum(rejected), rel=0.04)
    longer, shorter = (sum(map(compare, chosen, rejected)) for compare in (int.__gt__, int.__lt__))
    assert longer == pytest.approx(shorter, rel=0.1)


def test_the_last_answer_counts():
    assert tasks.extract_answer("The answer is 3. No: The answer is a, b.") == "a, b"
    assert tasks.extract_answer("I do not know.") is None
