"""Format preference: which columns are read as what, the ids of trees beside those of SFT, what becomes of rows."""

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from transformers import AutoTokenizer

from minorca import UserError, load_tokenizer, render_chat
from minorca.config import Config, DataConfig, ModelConfig, Source
from minorca.data.__main__ import main
from minorca.data.chat_template import render
from minorca.data.conversation import Conversation, Preference
from minorca.data.formats import convert_record
from minorca.data.packing import make_batch
from minorca.data.rendering import render_rows
from minorca.data.sources import Row
from minorca.data.store import TokenStore
from minorca.data.tally import raise_errors
from minorca.train.inputs import read_data
from tests.data.samples import conversation, message, path_of, prepare, rows_in, same_rows, write
from tests.data.test_chat_template import CHATML, with_template
from tests.data.test_mistral_template import CALL, TOOLS, result
from tests.data.test_tokenizer import V1, V2, V3, orca, sentencepiece_directory

ASKED = conversation("Be brief.", "2 + 2?")
EARLIER = conversation("Be brief.", "Hi", "Hello", "2 + 2?")
UNTRAINED = [m | {"weight": 0} if m["role"] == "assistant" else m for m in EARLIER]
GOOD, BAD = message("assistant", "4"), message("assistant", "5")
FOUND = [message("assistant", "", tool_calls=[CALL]), result("4"), GOOD]
PAIR = {"chosen": "4", "rejected": "5"}
TEXTS = {"system": "Be brief.", "prompt": "2 + 2?"}
LIST = [
    {"response": "5", "overall_score": 1.5, "model": "m"},
    {"response": "4", "overall_score": 4.5, "model": "n"},
    {"response": "6", "overall_score": 3.0, "model": "o"},
]
# Records, and the prompt, the answers and the scores that they have.
ACCEPTED = {
    "orca_dpo_pairs": ({"system": "Be brief.", "question": "2 + 2?"} | PAIR, ASKED, [GOOD, BAD], [1, 0]),
    "text": (TEXTS | PAIR, ASKED, [GOOD, BAD], [1, 0]),
    "an instruction": ({"instruction": "2 + 2?"} | PAIR, ASKED[1:], [GOOD, BAD], [1, 0]),
    "messages": ({"prompt": EARLIER, "chosen": [GOOD], "rejected": [BAD]}, UNTRAINED, [GOOD, BAD], [1, 0]),
    "JSON": (
        {"prompt": json.dumps(EARLIER), "chosen": json.dumps([GOOD]), "rejected": "5"},
        UNTRAINED,
        [GOOD, BAD],
        [1, 0],
    ),
    "LLaMA-Factory's messages": (
        {"prompt": ASKED, "chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt", "value": "5"}},
        ASKED,
        [GOOD, BAD],
        [1, 0],
    ),
    "an implicit prompt": (
        {"chosen": [*EARLIER, GOOD], "rejected": [*EARLIER, BAD]},
        UNTRAINED,
        [GOOD, BAD],
        [1, 0],
    ),
    "identical conversations": (
        {"chosen": [*EARLIER, GOOD], "rejected": [*EARLIER, GOOD]},
        UNTRAINED,
        [GOOD, GOOD],
        [1, 0],
    ),
    "UltraFeedback binarized": (
        {
            "prompt": "2 + 2?",
            "chosen": [*ASKED, GOOD],
            "rejected": [*ASKED, BAD],
            "score_chosen": 8,
            "score_rejected": 2,
        },
        ASKED,
        [GOOD, BAD],
        [1, 0],
    ),
    "a prompt in messages, repeated": (
        {"prompt": EARLIER[1:], "chosen": [*EARLIER, GOOD], "rejected": [*EARLIER, BAD]},
        UNTRAINED,
        [GOOD, BAD],
        [1, 0],
    ),
    "UltraFeedback": ({"instruction": "2 + 2?", "completions": LIST}, ASKED[1:], "546", [1.5, 4.5, 3]),
    "other keys": (
        TEXTS | {"completions": [{"text": "4", "score": "2"}, {"content": "5", "rating": 1}]},
        ASKED,
        [GOOD, BAD],
        [2, 1],
    ),
    "desirable": (TEXTS | {"completion": "4", "label": True}, ASKED, [GOOD], [1]),
    "undesirable": (TEXTS | {"completion": [BAD], "label": 0.0}, ASKED, [BAD], [0]),
    "a label in text": (TEXTS | {"completion": "4", "label": " True"}, ASKED, [GOOD], [1]),
    "a label in digits": (TEXTS | {"completion": "5", "label": "0"}, ASKED, [BAD], [0]),
    "higher scores": (TEXTS | PAIR | {"chosen-rating": "4.5", "rejected-rating": 4}, ASKED, [GOOD, BAD], [1, 0]),
    "equal scores": (TEXTS | PAIR | {"chosen_score": 4, "rejected_score": 4.0}, ASKED, [GOOD, BAD], [0, 0]),
    "one score": (TEXTS | PAIR | {"chosen_score": 4, "rejected_score": None}, ASKED, [GOOD, BAD], [1, 0]),
    "a tie by status": (TEXTS | PAIR | {"status": "tie"}, ASKED, [GOOD, BAD], [0, 0]),
}


def answers_of(found: Preference) -> list[list[dict]]:
    return [answer.messages for answer in found.answers]


def expected_answers(prompt: list[dict], answers) -> list[list[dict]]:
    each = [message("assistant", text) for text in answers] if isinstance(answers, str) else answers
    return [[*prompt, *(answer if isinstance(answer, list) else [answer])] for answer in each]


@pytest.mark.parametrize("name", ACCEPTED)
def test_columns(name):
    record, prompt, answers, scores = ACCEPTED[name]
    before = json.dumps(record)
    counts = Counter()
    found = convert_record(record, "preference", counts)
    assert isinstance(found, Preference) and json.dumps(record) == before
    assert answers_of(found) == expected_answers(prompt, answers) and found.scores == scores
    unused = Counter({"completions with the unused key model": 3} if name == "UltraFeedback" else {})
    assert +counts == unused


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_files_that_hold_them(suffix, tmp_path):
    """Every kind of file gives the same answers, lists in the cells of a table as JSON."""
    for name, (record, prompt, answers, scores) in ACCEPTED.items():
        if suffix == "csv":
            record = {
                column: json.dumps(value) if isinstance(value, list) else value for column, value in record.items()
            }
            if any(isinstance(value, dict) for value in record.values()):
                continue
        path = write(tmp_path / f"{name}.{suffix}", [record])
        (row,) = rows_in(path, "preference")
        assert isinstance(row.content, Preference)
        assert answers_of(row.content) == expected_answers(prompt, answers) and row.content.scores == scores


def test_tools_and_answers_of_several_messages():
    """The answer is all that follows the prompt; calls in it are trained, earlier ones are not."""
    record = {"prompt": [message("user", "2 + 2?")], "chosen": FOUND, "rejected": "5", "tools": json.dumps(TOOLS)}
    found = convert_record(record, "preference", Counter())
    assert isinstance(found, Preference) and all(answer.tools == TOOLS for answer in found.answers)
    assert [len(answer.messages) for answer in found.answers] == [4, 2]
    whole = {"chosen": [message("user", "2 + 2?"), *FOUND], "rejected": [message("user", "2 + 2?"), *FOUND[:2], BAD]}
    found = convert_record(whole, "preference", Counter())
    assert isinstance(found, Preference)
    assert [[m.get("weight") for m in answer.messages] for answer in found.answers] == [[None, 0, None, None]] * 2


def test_a_table_of_several_kinds():
    """A row is what its columns with values say; what it has besides is counted."""
    none: dict = {"chosen": None, "rejected": None, "completions": None, "completion": None, "label": None}
    counts = Counter()
    for name, scores in (("UltraFeedback", [1.5, 4.5, 3]), ("desirable", [1]), ("one score", [1, 0])):
        found = convert_record(none | ACCEPTED[name][0], "preference", counts)
        assert isinstance(found, Preference) and found.scores == scores
    found = convert_record(TEXTS | PAIR | {"completions": LIST}, "preference", counts)
    assert isinstance(found, Preference) and found.scores == [1, 0]
    assert counts["with completions beside chosen and rejected, not used"] == 1


def test_columns_and_roles_of_other_names():
    """Errors name the data's."""
    names = {"question": "input", "chosen": "better", "rejected": "worse"}
    record = {"system": "don’t", "input": "2 + 2?", "better": "4", "worse": "5", "order": "x"}
    counts = Counter()
    found = convert_record(record, "preference", counts, names)
    assert isinstance(found, Preference) and answers_of(found)[0] == conversation("don't", "2 + 2?", "4")
    assert counts == {"with the unused column order": 1, "system prompts with ’ read as '": 1}
    with pytest.raises(UserError) as caught:
        convert_record(record | {"worse": 3}, "preference", Counter(), names)
    assert caught.value.sentence == "worse is int; expected text or a list of messages"
    turns = [message("narrator", "s"), message("user", "q")]
    chats = {"chosen": [*turns, GOOD], "rejected": [*turns, BAD]}
    found = convert_record(chats, "preference", Counter(), roles={"narrator": "system"})
    assert isinstance(found, Preference) and found.answers[0].messages[0]["role"] == "system"


WHOLE = {"chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]}
# Records, and the start of what is said of them.
REJECTED = {
    "no columns": (
        {"text": "x"},
        "column chosen is missing; format preference needs the columns chosen, rejected, or completions, or "
        "completion, label, got text",
    ),
    "half a pair": ({"prompt": "q", "chosen": "a"}, "column rejected is missing; "),
    "half a label": ({"prompt": "q", "completion": "a"}, "column label is missing; "),
    "no prompt": (PAIR, "column prompt is missing; expected one of prompt, question, instruction, or whole"),
    "a prompt that is null": (PAIR | {"prompt": None}, "column prompt is missing"),
    "two prompts": (PAIR | {"prompt": "q", "question": "r"}, "prompt and question differ, and each may be the prompt"),
    "a number": (TEXTS | PAIR | {"chosen": 1}, "chosen is int; expected text or a list of messages"),
    "an object": (TEXTS | PAIR | {"rejected": {"a": 1}}, "rejected[0] has a; expected {role, content} or"),
    "no messages": (TEXTS | PAIR | {"rejected": []}, "rejected is empty; expected at least one message"),
    "another role": (TEXTS | PAIR | {"rejected": [message("me", "5")]}, "rejected[0].role is 'me'; expected one of"),
    "no answer": ({"chosen": ASKED, "rejected": [*ASKED, BAD]}, "chosen has no message from assistant"),
    "a result alone": (TEXTS | PAIR | {"chosen": [result("4")]}, "chosen has no message from assistant"),
    "one whole conversation": (TEXTS | PAIR | {"chosen": WHOLE["chosen"]}, "chosen and rejected are a whole conver"),
    "two questions": (
        WHOLE | {"rejected": [ASKED[0], message("user", "3 + 3?"), BAD]},
        "chosen and rejected differ in message 1, which is no answer; expected two answers to one prompt",
    ),
    "another prompt": (WHOLE | {"prompt": "3 + 3?"}, "chosen and rejected do not begin with the prompt, '3 + 3?'"),
    "another system prompt": (WHOLE | {"system": "Be kind."}, "system differs from the system message in the prompt"),
    "worse than rejected": (
        TEXTS | PAIR | {"chosen_score": 3, "rejected_score": "7.5"},
        "chosen_score and rejected_score are 3 and 7.5, so the rejected answer is the better one; fix or remove",
    ),
    "no score": (TEXTS | PAIR | {"chosen_score": 3, "rejected_score": "good"}, "rejected_score is 'good'; expected"),
    "an infinite score": (TEXTS | PAIR | {"chosen_score": 1e39, "rejected_score": 1}, "chosen_score is 1e+39; expec"),
    "not a list": (TEXTS | {"completions": {"text": "4"}}, "completions is dict; expected a list of {response"),
    "one answer": (TEXTS | {"completions": LIST[:1]}, "completions has 1 of them; expected at least two"),
    "a text in a list": (TEXTS | {"completions": ["4", "5"]}, "completions[0] is text; expected {response"),
    "an answer without a score": (TEXTS | {"completions": [LIST[0], {"text": "a"}]}, "completions[1] has text; expec"),
    "a score that is true": (
        TEXTS | {"completions": [LIST[0], {"text": "a", "score": True}]},
        "completions[1].score is True; expected a number",
    ),
    "a whole conversation in a list": (
        TEXTS | {"completions": [LIST[0], {"content": WHOLE["chosen"], "score": 1}]},
        "completions[1].content begins with a message from system; expected an answer",
    ),
    "a label in words": (TEXTS | {"completion": "a", "label": "good"}, "label is 'good'; expected true or false"),
    "a label of 2": (TEXTS | {"completion": "a", "label": 2}, "label is 2; expected true or false"),
    "a label that is null": (TEXTS | {"completion": "a", "label": None}, "label is None; expected true or false"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_what_is_invalid(name):
    record, says = REJECTED[name]
    with pytest.raises(UserError) as caught:
        convert_record(record, "preference", Counter())
    assert caught.value.sentence.startswith(says)


# ----------------------------------------------------------------------------------------------------------- rendering


def rows_of(*preferences: Preference) -> list[Row]:
    return [Row("rows.jsonl", "line", number, content) for number, content in enumerate(preferences, 1)]


def tree(prompt: list[dict], *answers: str | list[dict], scores: list[float] | None = None, tools=()) -> Preference:
    """Answers to a prompt whose earlier ones are not trained, best first."""
    earlier = [m | {"weight": 0} if m["role"] == "assistant" else m for m in prompt]
    each = [[message("assistant", answer)] if isinstance(answer, str) else answer for answer in answers]
    ranks = list(map(float, reversed(range(len(answers))))) if scores is None else scores
    return Preference([Conversation([*earlier, *answer], list(tools)) for answer in each], ranks)


def rendered(tok, template: str, *preferences: Preference, **settings):
    """The store of rows that are all valid, and the counts."""
    store, tally = render_rows(rows_of(*preferences), tok, DataConfig("x", **settings), template)
    raise_errors([tally])
    return store, tally.counts


def paths(store: TokenStore, row: int) -> list[tuple[list[int], list[bool]]]:
    """The ids of a row's prompt with each of its branches, and what is trained of them."""
    ids, trained = store.row(row)
    starts, _ = store.branches(row)
    parts = [range(starts[0]), *(range(a, b) for a, b in zip(starts, [*starts[1:], len(ids)]))]
    return [([int(ids[i]) for part in (parts[0], branch) for i in part],
             [bool(trained[i]) for part in (parts[0], branch) for i in part]) for branch in parts[1:]]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(smollm2, tmp_path_factory):
    home = tmp_path_factory.mktemp("tokenizers")
    mistral = {
        n: load_tokenizer(sentencepiece_directory(home / f"v{n}", source, f"tokenizer.model.v{n}"))
        for n, source in ((1, V1), (2, V2), (3, V3))
    }
    return {
        "chatml": load_tokenizer(orca(home / "orca")),
        "mistral-v1": mistral[1],
        "mistral-v2": mistral[2],
        "mistral-v3": mistral[3],
        "jinja": load_tokenizer(with_template(home / "jinja", CHATML)),
        "smollm2": load_tokenizer(smollm2),
        "none": mistral[3],
    }


TEMPLATES = ["chatml", "mistral-v1", "mistral-v2", "mistral-v3", "jinja", "smollm2", "none"]
WORDS = [
    "4",
    "four",
    " Sure!",
    "\n\n",
    "naïve 日本語 🦜",
    "[INST]",
    "<|im_end|>",
    "</s>",
    "x",
    "  ",
    "\t1.",
    "It is",
    "…",
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_path_is_the_conversation_as_sft_renders_it(name, tokenizers):
    """For any texts: the prompt's ids are those of a generation, and prompt and branch those of the conversation, with
    the same tokens trained, up to the last of them.
    """
    tok, template = tokenizers[name], "jinja" if name == "smollm2" else name
    draw = random.Random(name)
    preferences = []
    while len(preferences) < 40:
        texts = ["".join(draw.choices(WORDS, k=draw.randint(1, 4))) for _ in range(7)]
        prompt = [message("user", texts[0])]
        if template != "none":
            prompt = conversation(draw.choice(["", texts[1]]), *texts[2 : 2 + draw.choice((1, 3))])
        answers = list(dict.fromkeys(text.strip() for text in texts[4:] if text.strip()))
        if len(answers) > 1:
            preferences.append(tree(prompt, *answers))
    store, counts = rendered(tok, template, *preferences, pairs="all", parse_control_tokens=False)
    assert counts["kept"] == len(store) == 40
    for row, preference in enumerate(preferences):
        prompt = preference.answers[0].messages[:-1]
        starts, scores = store.branches(row)
        asked = [m for m in prompt if m.get("weight") != 0]
        if template != "none":
            # Of template none, control strings in a prompt to generate from are control tokens.
            asked = [{key: value for key, value in m.items() if key != "weight"} for m in prompt]
            assert store.row(row)[0][: starts[0]].tolist() == render_chat(tok, asked, template=template)
        assert scores.tolist() == preference.scores
        for answer, (ids, trained) in zip(preference.answers, paths(store, row), strict=True):
            whole = render(tok, answer.messages, template, parse_control=False)
            assert whole.ids[: len(ids)] == ids and whole.trained[: len(ids)] == trained
            assert trained[-1] and not any(whole.trained[len(ids) :])
            assert not tok.adds_bos or (ids[0] == tok.bos_id and ids.count(tok.bos_id) == 1)
            assert sum(i in tok.stop_ids for i in ids[starts[0] :]) == 1


def test_trees_are_what_others_render(tokenizers, smollm2, tmp_path):
    """Prompt and branch, beside transformers' template and mistral-common's encoding of the same conversation."""
    texts = ["Sure: 4.", "I think it's 5\n\nor 6.", "é 日本 🦜"]
    for prompt in (ASKED, EARLIER):
        store, _ = rendered(tokenizers["smollm2"], "jinja", tree(prompt, *texts), pairs="all")
        reference = AutoTokenizer.from_pretrained(smollm2)
        for text, (ids, _) in zip(texts, paths(store, 0), strict=True):
            expected = reference.apply_chat_template([*prompt, message("assistant", text)], return_dict=False)
            # transformers writes a newline after <|im_end|>
            assert reference.decode(expected[-1:]) == "\n" and ids == expected[:-1]
        for version, source in ((1, V1), (2, V2), (3, V3)):
            template = f"mistral-v{version}"
            store, _ = rendered(tokenizers[template], template, tree(prompt, *texts), pairs="all")
            common = MistralTokenizer.from_file(str(source), mode=ValidationMode.finetuning)
            for text, (ids, _) in zip(texts, paths(store, 0), strict=True):
                request = ChatCompletionRequest(messages=[*prompt, message("assistant", text)])  # pyright: ignore
                assert ids == common.encode_chat_completion(request).tokens


def test_answers_with_tools(tokenizers):
    """A call, its result and an answer: the result is not scored, and under train_on last, the answer alone is."""
    tok = tokenizers["mistral-v3"]
    asked = [message("user", "2 + 2?")]
    call, *rest = FOUND
    preference = tree(asked, [call, *rest], [call, result("5"), BAD], "5", tools=TOOLS)
    store, _ = rendered(tok, "mistral-v3", preference, pairs="all")
    last, _ = rendered(tok, "mistral-v3", preference, pairs="all", train_on="last")
    assert store.branch_starts[0] == len(render_chat(tok, asked, template="mistral-v3", tools=TOOLS))
    for answer, (ids, trained), (others, only) in zip(preference.answers, paths(store, 0), paths(last, 0), strict=True):
        whole = render(tok, answer.messages, "mistral-v3", tools=TOOLS)
        assert (ids, trained) == (whole.ids, whole.trained) and others == ids
        scored = [i for i, one in zip(ids, only) if one]
        assert tok.decode(scored).strip() == answer.messages[-1]["content"] and scored[-1] == tok.eos_id
    # The call that two of them share is in both branches where it is scored; else it ends with the prompt's tokens.
    assert [sum(trained) for _, trained in paths(store, 0)] != [sum(trained) for _, trained in paths(last, 0)]


def test_white_space_around_answers(tokenizers):
    """It is removed and counted; template none keeps what separates all answers from the prompt."""
    padded, plain = tree(ASKED, " Sure! \n", "No"), tree(ASKED, "Sure!", "No")
    tok = tokenizers["chatml"]
    store, counts = rendered(tok, "chatml", padded)
    assert same_rows(store, rendered(tok, "chatml", plain)[0])
    assert counts["with white space around answers removed"] == 1
    tok = tokenizers["none"]
    for answers, kept in (((" 4", " 5\n"), (" 4", " 5")), ((" 4", "5"), ("4", "5")), ((" 4", "\n5"), ("4", "5"))):
        store, _ = rendered(tok, "none", tree([message("user", "2 + 2 =")], *answers))
        assert [tok.decode(ids[1:-1]) for ids, _ in paths(store, 0)] == [f"2 + 2 ={text}" for text in kept]


# ------------------------------------------------------------------------------------------------------------ outcomes

DROPPED = {
    "tie": tree(ASKED, "4", "5", scores=[0, 0]),
    "identical answers": tree(ASKED, "4", " 4\n"),
    "empty response": tree(ASKED, "4", " \n"),
    "too long": tree(ASKED, "4", "5 " * 200),
    "nothing to train on": tree(ASKED, "4", [message("assistant", "5", weight=0)]),
}


@pytest.mark.parametrize("reason", DROPPED)
def test_rows_that_are_dropped(reason, tokenizers):
    tok = tokenizers["chatml"]
    store, counts = rendered(tok, "chatml", DROPPED[reason], tree(ASKED, "4", "5"), seq_len=128)
    assert counts[f"dropped: {reason}"] == 1 and counts["kept"] == len(store) == 1
    assert store.branches(0)[1].tolist() == [1, 0] and store.pair_counts.tolist() == [1]


@pytest.mark.parametrize(
    "reason, settings, says",
    [
        ("empty response", {"empty_response": "error"}, "rows.jsonl, line 1: the response is empty; fix the row"),
        (
            "too long",
            {"too_long": "error", "seq_len": 128},
            "rows.jsonl, line 1: has .* tokens, more than data.seq_len",
        ),
    ],
)
def test_rows_that_are_errors_where_asked(reason, settings, says, tokenizers):
    with pytest.raises(UserError, match=f"^{says}"):
        rendered(tokenizers["chatml"], "chatml", DROPPED[reason], **settings)


def test_scored_lists(tokenizers):
    """The best against the worst, or all that differ, best first; empty and repeated answers are left out."""
    tok = tokenizers["chatml"]
    preference = tree(ASKED, "b", "", "a", "a", "c", "d", scores=[3, 9, 4.5, 2, 3, -1])
    store, counts = rendered(tok, "chatml", preference)
    assert [tok.decode([i for i, one in zip(*path) if one]) for path in paths(store, 0)] == ["a", "d"]
    assert store.branches(0)[1].tolist() == [1, 0] and counts["with empty answers left out"] == 1
    store, counts = rendered(tok, "chatml", preference, pairs="all")
    assert counts["with repeated answers left out"] == 1 and counts["with equal scores, which make no pairs"] == 1
    assert [tok.decode([i for i, one in zip(*path) if one]) for path in paths(store, 0)] == ["a", "b", "c", "d"]
    assert store.branches(0)[1].tolist() == [4.5, 3, 3, -1] and store.pair_counts.tolist() == [5]
    batch = make_batch(store, np.array([0]))
    assert batch.answers is not None
    assert batch.answers.pairs.tolist() == [[0, 1], [0, 2], [0, 3], [1, 3], [2, 3]]
    for pairs in ("extremes", "all"):
        _, counts = rendered(tok, "chatml", tree(ASKED, "a", "b", "c", scores=[2, 2, 2]), pairs=pairs)
        assert counts["dropped: tie"] == 1


def test_labelled_rows_have_one_answer_and_no_pair(tokenizers):
    tok = tokenizers["chatml"]
    store, _ = rendered(tok, "chatml", tree(ASKED, "4", scores=[1]), tree(ASKED, "5", scores=[0]))
    assert [store.branches(row)[1].tolist() for row in range(2)] == [[1], [0]]
    assert store.pair_counts.tolist() == [0, 0] and store.branch_counts.tolist() == [1, 1]
    _, counts = rendered(tok, "chatml", tree(ASKED, " ", scores=[1]))
    assert counts["dropped: empty response"] == 1


def test_answers_to_no_prompt_are_invalid(smollm2):
    """Without a bos, the first token of an answer would follow nothing."""
    tok = load_tokenizer(smollm2)
    assert not tok.adds_bos
    rows = rows_of(tree([message("user", "")], "yes", "no"))
    _, tally = render_rows(rows, tok, DataConfig("x"), "none")
    assert str(tally.errors[0]) == (
        "rows.jsonl, line 1: has answers without a prompt: their first tokens differ; fix or remove the row"
    )
    _, tally = render_rows(rows, tok, DataConfig("x", bad_rows="drop"), "none")
    assert [what for what, count in tally.counts.items() if count] == [
        "dropped: has answers without a prompt: their first tokens differ"
    ]


# --------------------------------------------------------------------------------------------------------------- stores


def pairs_of(count: int) -> list[dict]:
    """Rows of every kind, of which some are dropped."""
    made = []
    for n in range(count):
        worse = ("no", "", " yes ", "no " * 200)[n % 4 if n % 5 == 0 else 0]
        made.append({"system": "s" * (n % 3), "question": f"Say {n}", "chosen": "yes", "rejected": worse})
    return made


@pytest.fixture
def pairs(tmp_path) -> DataConfig:
    lists = [{"prompt": f"List {n}", "completions": LIST[: 2 + n % 2]} for n in range(7)]
    sources = [
        Source(write(tmp_path / "pairs.parquet", pairs_of(60))),
        Source(write(tmp_path / "lists.jsonl", lists)),
        Source(write(tmp_path / "labels.csv", [{"prompt": "q", "completion": "a", "label": n % 2} for n in range(5)])),
    ]
    return DataConfig([*sources], format="preference", pairs="all", seq_len=64, store=str(tmp_path / "store"))


def in_memory(data: DataConfig, model: Path) -> TokenStore:
    """All rows, rendered at once in this process."""
    tok = load_tokenizer(model)
    rows = [row for source in data.sources(data.train) for row in rows_in(source.path, "preference")]
    return render_rows(rows, tok, data, "chatml")[0]


ARRAYS = ("tokens", "trained", "offsets", "numbers", "row_trained", "branch_offsets", "branch_starts", "branch_scores")


def test_a_store_of_trees(pairs, model):
    """Memory-mapped, and the same as rows in memory; found again; rows picked of it have their branches."""
    store = prepare(pairs, model)
    expected = in_memory(pairs, model)
    assert isinstance(store.branch_scores, np.memmap) and store.sha256() == expected.sha256()
    for name in ARRAYS:
        array, other = getattr(store, name), getattr(expected, name)
        assert np.array_equal(array, other) and array.dtype == other.dtype, name
    counts = store.sources[0].counts
    dropped = {what.removeprefix("dropped: "): count for what, count in counts.items() if what.startswith("dropped")}
    assert dropped == {"empty response": 3, "identical answers": 3, "too long": 3} and counts["kept"] == 51
    assert store.branch_counts.tolist() == [2] * 51 + [2, 3] * 3 + [2] + [1] * 5
    assert store.pair_counts.tolist() == [1] * 51 + [1, 3] * 3 + [1] + [0] * 5
    again = prepare(pairs, model)
    assert path_of(again) == path_of(store) and same_rows(again, store)
    part = store.select([60, 52, 3])
    assert part.branch_counts.tolist() == [1, 3, 2] and part.branches(1)[1].tolist() == [4.5, 3, 1.5]
    assert paths(part, 2) == paths(store, 3)


def test_the_setting_of_pairs_is_of_preferences_alone(pairs, model, data):
    """Stores of other formats keep their names and files."""
    other = prepare(replace(pairs, pairs="extremes"), model)
    assert path_of(other) != path_of(prepare(pairs, model)) and other.branch_counts.max() == 2
    store = prepare(data, model)
    assert path_of(prepare(replace(data, pairs="all"), model)) == path_of(store)
    assert not store.has_branches and not any(path.name.startswith("branch") for path in path_of(store).iterdir())
    assert [array.tolist() for array in store.branches(0)] == [[], []]
    assert not store.branch_counts.any() and not store.pair_counts.any()
    assert make_batch(store, np.array([0, 5])).answers is None


def test_a_chunk_of_which_no_row_is_left(pairs, model, tmp_path, monkeypatch):
    monkeypatch.setattr("minorca.data.rendering.CHUNK_ROWS", 2)
    rows = [*pairs_of(4), *[TEXTS | PAIR | {"status": "tie"}] * 4, *pairs_of(3)]
    settings = replace(pairs, train=write(tmp_path / "ties.jsonl", rows))
    store = prepare(settings, model)
    assert len(store) == 7 and store.sha256() == in_memory(settings, model).sha256()


def test_a_run_is_refused_rows_that_its_objective_cannot_compare(pairs, model):
    """Labels are of KTO alone; the first such row is named."""
    config = Config(ModelConfig(str(model)), pairs)
    tok = load_tokenizer(model)
    config.train.objective = "kto"
    assert len(read_data(config, tok, "chatml")[0]) == 63
    config.train.objective = "dpo"
    with pytest.raises(UserError) as caught:
        read_data(config, tok, "chatml")
    labels = pairs.sources(pairs.train)[2].path
    assert str(caught.value).startswith(
        f"{labels}, line 2: has one answer with a label, and train.objective dpo compares"
    )
    pairs.train, pairs.eval = pairs.train[:2], labels
    with pytest.raises(UserError, match="has one answer with a label"):
        read_data(config, tok, "chatml")


# ---------------------------------------------------------------------------------------------------------------- show


def shown(capsys, *argv: str) -> list[str]:
    main(["show", *argv])
    return capsys.readouterr().out.split("--- ")[1:]


def test_show_prints_a_pair(model, tmp_path, capsys):
    """The prompt, then each answer under a heading."""
    orca_pair = {"system": "Be brief.", "question": "2 + 2?", "chosen": " 4", "rejected": "5"}
    rows = [orca_pair, orca_pair | {"rejected": "4"}, TEXTS | {"completion": "4", "label": 1}]
    rows += [{"prompt": "2 + 2?", "completions": LIST}]
    path = write(tmp_path / "rows.jsonl", rows)
    (tmp_path / "run.yaml").write_text(
        f"model: {{path: {model}}}\ndata: {{train: {path}, format: preference}}\ntrain: {{objective: dpo}}\n"
    )
    options = ("--config", str(tmp_path / "run.yaml"), "--rows", "4", "--data.pairs", "all")
    pair, same, label, scored = shown(capsys, *options)
    prompt = "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    title, text = pair.split("\n", 1)
    assert title.startswith(f"{path}, line 1: template chatml, ")
    assert title.endswith(", 30 tokens, 6 trained, 24 in the prompt, with white space around answers removed")
    assert text == (
        f"{prompt}\n-- chosen: 3 tokens, 3 trained\n«4<|im_end|>»\n-- rejected: 3 tokens, 3 trained\n«5<|im_end|>»\n"
    )
    assert same.startswith(f"{path}, line 2: dropped: identical answers\n") and "«" not in same
    assert "-- desirable: 3 tokens, 3 trained\n«4<|im_end|>»" in label
    assert [line for line in scored.splitlines() if line.startswith("-- ")] == [
        f"-- score {score}: 3 tokens, 3 trained" for score in ("4.5", "3", "1.5")
    ]
