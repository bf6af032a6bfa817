"""Two models side by side, compared with transformers and PEFT, and the paired test with its definition."""

import copy
import itertools
import json
import math
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from minorca import UserError, load_tokenizer, render_chat
from minorca.compare import __main__ as command
from minorca.compare import comparison, sides
from minorca.compare.paired_test import FLIPS, paired, t_quantile
from tests.helpers import random_adapter, random_mistral, save_tokenizer

ROWS = [
    {"system_prompt": "Be brief.", "question": "What says a clock?", "response": "Tick, tock."},
    {"system_prompt": "", "question": "And <b>naïvely</b>?", "response": "日本語 and more"},
    {"system_prompt": "", "question": "Again", "response": "So it does, so it does"},
]
FIELDS = {"vocab_size": 260, "sliding_window": 24, "initializer_range": 0.08}


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def base(save_mistral):
    """A model's directory, and transformers' model in fp64."""
    directory, model = save_mistral(**FIELDS)
    save_tokenizer(directory)
    return directory, model.double()


@pytest.fixture
def adapter(base, tmp_path):
    """adapter(name, **config): an adapter's directory, and PEFT's model in fp64."""

    def make(name: str, scale: float, **config):
        model = random_adapter(copy.deepcopy(base[1]).float(), tmp_path / name, "qvo", lora_alpha=scale, **config)
        return tmp_path / name, model.double()

    return make


@pytest.fixture
def run(tmp_path):
    """run(A, B, options): the numbers that are written; in fp32."""

    def compare(a, b, **options) -> dict:
        if "prompts" not in options:
            options["prompts"] = write_rows(tmp_path / "rows.jsonl", ROWS)
        options = {"output": tmp_path / "out" / "page.html", "dtype": "float32", "max-new-tokens": 5} | options
        command.main([str(a), str(b), *(f"--{key}={value}" for key, value in options.items())])
        return json.loads((tmp_path / "out" / "page.json").read_text())

    return compare


def reference_logps(model, ids: list[int], answer: int) -> Tensor:
    """transformers' log-probabilities [n, V] at the positions that predict the last `answer` ids."""
    with torch.no_grad():
        logits_TV = model(torch.tensor([ids])).logits[0]
    return logits_TV[-answer - 1 : -1].log_softmax(-1)


def greedy(model, ids: list[int], count: int) -> list[int]:
    """By forwards without a cache."""
    for _ in range(count):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-count:]


def chatml(tok, row: dict) -> tuple[list[int], list[int]]:
    """The ids of a row's prompt, and of its answer with the token that ends it."""
    system = [{"role": "system", "content": row["system_prompt"]}] if row["system_prompt"] else []
    prompt = render_chat(tok, [*system, {"role": "user", "content": row["question"]}])
    return prompt, [*tok.encode(row["response"]), tok.control_ids["<|im_end|>"]]


def check_scores(result: dict, directory: Path, a, b, tolerance: float = 1e-4) -> None:
    """Log-probabilities, perplexities and both divergences of every row are those of transformers' fp64 models."""
    tok = load_tokenizer(directory)
    totals: dict[str, list[Tensor]] = {"a": [], "b": [], "kl_a_b": [], "kl_b_a": []}
    for row, found in zip(ROWS, result["rows"], strict=True):
        prompt, answer = chatml(tok, row)
        # without the newline after the answer, which is not scored
        a_MV, b_MV = (reference_logps(model, prompt + answer, len(answer)) for model in (a, b))
        targets = torch.tensor(answer)[:, None]
        for name, logp_MV in (("a", a_MV), ("b", b_MV)):
            logps = logp_MV.gather(1, targets)[:, 0]
            totals[name].append(logps)
            assert found["tokens"][f"logp_{name}"] == pytest.approx(logps.tolist(), abs=tolerance)
            assert found[name]["logp"] == pytest.approx(logps.sum().item(), abs=tolerance * len(answer))
            assert found[name]["perplexity"] == pytest.approx(math.exp(-logps.mean()), rel=tolerance)
        for name, p_MV, q_MV in (("kl_a_b", a_MV, b_MV), ("kl_b_a", b_MV, a_MV)):
            divergence = torch.nn.functional.kl_div(q_MV, p_MV, log_target=True, reduction="none").sum(1)
            totals[name].append(divergence)
            assert found["tokens"][name] == pytest.approx(divergence.tolist(), rel=1e-3, abs=1e-6)
            assert found["kl"][name] == pytest.approx(divergence.mean().item(), rel=1e-3, abs=1e-6)
        assert "".join(found["tokens"]["text"]) == f"{row['response']}<|im_end|>"
    size = sum(len(row["response"].encode()) for row in ROWS)
    for name in ("a", "b"):
        logps = torch.cat(totals[name])
        assert result[name]["tokens"] == len(logps)
        assert result[name]["perplexity"] == pytest.approx(math.exp(-logps.mean()), rel=tolerance)
        assert result[name]["perplexity_per_byte"] == pytest.approx(math.exp(-logps.sum() / size), rel=tolerance)
    for name in ("kl_a_b", "kl_b_a"):
        assert result["kl"][name] == pytest.approx(torch.cat(totals[name]).mean().item(), rel=1e-3, abs=1e-6)
    one, two = (np.array([logps.sum().item() for logps in totals[name]]) for name in ("a", "b"))
    assert result["difference"]["mean"] == pytest.approx((one - two).mean(), abs=1e-3)


def test_two_adapters_of_one_base(base, adapter, run, monkeypatch):
    """The base is loaded once, and their numbers and answers are PEFT's; no base is named: the adapters know it."""
    (one, a), (two, b) = adapter("one", 8), adapter("two", 2)
    loaded = []
    load_model = sides.load_model
    monkeypatch.setattr(sides, "load_model", lambda *args, **kw: loaded.append(args[0]) or load_model(*args, **kw))
    result = run(one, two, model=base[0])
    assert loaded == [base[0]]
    check_scores(result, base[0], a, b)
    tok = load_tokenizer(base[0])
    for row, found in zip(ROWS, result["rows"]):
        prompt, _ = chatml(tok, row)
        for name, model in (("a", a), ("b", b)):
            assert found[name]["answer"] == tok.decode(greedy(model, prompt, 5))
    assert result["answers"] == 3 and result["same_answers"] == sum(row["same"] for row in result["rows"])


def test_an_adapter_beside_its_base(base, adapter, run, capsys):
    directory, model = adapter("one", 8)
    check_scores(run(base[0], directory, model=base[0]), base[0], base[1], model)
    out = capsys.readouterr().out
    assert "perplexity of the reference answers: A " in out and "KL(A || B)" in out and "3 rows" in out


def test_an_adapter_that_changes_the_head_has_a_model_of_its_own(base, adapter, run):
    directory, model = adapter("one", 8, modules_to_save=["lm_head"])
    check_scores(run(base[0], directory, model=base[0]), base[0], base[1], model)


def test_models_of_other_sizes(base, run, tmp_path):
    other = random_mistral(3, **FIELDS | {"hidden_size": 32, "num_hidden_layers": 1})
    other.save_pretrained(tmp_path / "other")
    save_tokenizer(tmp_path / "other")
    check_scores(run(base[0], tmp_path / "other"), base[0], base[1], other.double())


def test_a_model_beside_itself(base, run):
    result = run(base[0], base[0])
    assert result["kl"] == {"kl_a_b": 0, "kl_b_a": 0} and result["same_answers"] == 3
    assert result["difference"]["mean"] == 0 and result["difference"]["p_value"] == 1


def test_chunks_and_batches_change_nothing(base, adapter, run, monkeypatch):
    directory, _ = adapter("one", 8)
    whole = run(base[0], directory, model=base[0])
    widest = []
    monkeypatch.setattr(comparison, "BATCH_TOKENS", 60)
    monkeypatch.setattr(sides, "CHUNK_ROWS", 3)
    divergence = comparison._divergence
    monkeypatch.setattr(comparison, "_divergence", lambda p, q: widest.append(len(p)) or divergence(p, q))
    parts = run(base[0], directory, model=base[0])
    assert max(widest) == 3
    for before, after in zip(whole["rows"], parts["rows"], strict=True):
        for name in ("logp_a", "logp_b", "kl_a_b", "kl_b_a"):
            assert after["tokens"][name] == pytest.approx(before["tokens"][name], abs=1e-5)


# ------------------------------------------------------------------------------------------------- what is not compared


def with_merges(directory: Path) -> None:
    """Gives the tokenizer of save_tokenizer a merge, whose id is that of no byte."""
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["so"] = 258
    content["model"]["merges"] = [["s", "o"]]
    path.write_text(json.dumps(content))


def test_other_tokenizers_are_compared_by_byte(base, run, tmp_path, capsys):
    other = random_mistral(3, **FIELDS)
    other.save_pretrained(tmp_path / "other")
    save_tokenizer(tmp_path / "other")
    with_merges(tmp_path / "other")
    result = run(base[0], tmp_path / "other")
    assert result["kl"] is None and "the tokenizers differ" in result["kl_refused"]
    assert all(row["kl"] is None and "tokens" not in row for row in result["rows"])
    assert "no KL: the tokenizers differ" in capsys.readouterr().out
    assert result["b"]["tokens"] == result["a"]["tokens"] - 1
    tok = load_tokenizer(tmp_path / "other")
    total = 0.0
    for row, found in zip(ROWS, result["rows"], strict=True):
        prompt, answer = chatml(tok, row)
        logps = reference_logps(other.double(), prompt + answer, len(answer)).gather(1, torch.tensor(answer)[:, None])
        assert found["b"]["logp"] == pytest.approx(logps.sum().item(), abs=1e-3)
        total += logps.sum().item()
    size = sum(len(row["response"].encode()) for row in ROWS)
    assert result["b"]["perplexity_per_byte"] == pytest.approx(math.exp(-total / size), rel=1e-4)


def test_other_numbers_of_ids(base, run, tmp_path):
    random_mistral(3, **FIELDS | {"vocab_size": 264}).save_pretrained(tmp_path / "other")
    save_tokenizer(tmp_path / "other")
    assert run(base[0], tmp_path / "other")["kl_refused"] == "A has 260 ids and B 264"


def test_other_templates(base, run, tmp_path):
    random_mistral(3, **FIELDS).save_pretrained(tmp_path / "other")
    save_tokenizer(tmp_path / "other")
    (tmp_path / "other" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {% generation %}{{ m['content'] }}{% endgeneration %}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    result = run(base[0], tmp_path / "other")
    assert (
        "other ids for A (template chatml) and B (template jinja); --template" in result["kl_refused"]
        and result["difference"]["rows"] == 3
    )
    assert run(base[0], tmp_path / "other", template="chatml")["kl"]


# ------------------------------------------------------------------------------------------------------------- prompts


def test_without_reference_answers_those_of_a_are_scored(base, adapter, run, tmp_path, capsys):
    """By their own ids, whatever their text would become; a model's likelihood of its own answers is no test of it."""
    directory, model = adapter("one", 8)
    # only a line feed ends a line
    (tmp_path / "lines.txt").write_text("\ufeffOne?\n\n  Two\u2028\fof?\nThree?\n")
    result = run(base[0], directory, model=base[0], prompts=tmp_path / "lines.txt", limit=2)
    texts = "One?", "  Two\u2028\fof?"
    assert [row["messages"] for row in result["rows"]] == [[{"role": "user", "content": text}] for text in texts]
    assert result["rows"][1]["place"].endswith("lines.txt, line 3")
    assert result["scored"] == "A's answers" and result["difference"] is None
    tok = load_tokenizer(base[0])
    for text, row in zip(texts, result["rows"], strict=True):
        prompt = render_chat(tok, [{"role": "user", "content": text}])
        answer = greedy(base[1], prompt, 5)
        assert row["a"]["answer"] == tok.decode(answer) and row["difference"] is None
        logps = [reference_logps(each, prompt + answer, 5) for each in (base[1], model)]
        for name, logp_MV in zip(("logp_a", "logp_b"), logps):
            expected = logp_MV.gather(1, torch.tensor(answer)[:, None])[:, 0].tolist()
            assert row["tokens"][name] == pytest.approx(expected, abs=1e-4)
        divergence = torch.nn.functional.kl_div(logps[1], logps[0], log_target=True, reduction="none").sum(1)
        assert row["tokens"]["kl_a_b"] == pytest.approx(divergence.tolist(), rel=1e-3, abs=1e-6)
    said = capsys.readouterr().out
    assert "perplexity of A's answers: A " in said and "KL(A || B)" in said and "p = " not in said
    assert "A&#39;s answer, token by token" in (tmp_path / "out" / "page.html").read_text()


def test_what_is_changed_in_rows_is_said(base, run, tmp_path, capsys):
    """And a row that is there twice, which training would drop, is compared twice."""
    rows = [ROWS[0] | {"id": "1"}, ROWS[0] | {"id": "1"}, ROWS[1] | {"response": " "}]
    result = run(base[0], base[0], prompts=write_rows(tmp_path / "data.jsonl", rows))
    assert len(result["rows"]) == 3 and result["difference"]["rows"] == 2 and result["notes"] == {}
    rows = [{"system_prompt": "You are an AI assistant that doesn’t lie.", "question": "q", "response": "r"}]
    result = run(base[0], base[0], prompts=write_rows(tmp_path / "apostrophes.jsonl", rows))
    assert result["notes"] == {"system prompts with ’ read as '": 1}
    assert "1 rows: system prompts with ’ read as '" in capsys.readouterr().out


@pytest.mark.parametrize(
    "format, row, asked, reference",
    [
        (
            "messages",
            {"messages": [{"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("user", "r"))]},
            3,
            "",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": f, "value": v} for f, v in (("human", "q"), ("gpt", "a")) * 2]},
            3,
            "a",
        ),
        ("preference", {"prompt": "q", "rejected": "bad", "chosen": "good"}, 1, "good"),
        ("preference", {"prompt": "q", "completion": "bad", "label": False}, 1, ""),
        ("prompt_completion", {"prompt": "q", "completion": " "}, 1, ""),
        ("text", {"text": "once upon"}, 0, "once upon"),
    ],
)
def test_formats(format, row, asked, reference, base, run, tmp_path):
    """The conversation up to the last answer is the prompt, that answer the reference; of several the best."""
    path = write_rows(tmp_path / "data.jsonl", [row])
    result = run(base[0], base[0], prompts=path, format=format)
    (found,) = result["rows"]
    assert (len(found["messages"]), found["reference"]) == (asked, reference)
    assert (result["difference"] is not None) == bool(reference)
    # the end is scored too, and the first id of a text is not; without a reference it is A's answer
    assert result["a"]["tokens"] == (len(reference) + (format != "text") if reference else 5)
    assert (found["a"]["answer"] is not None) == bool(asked)


def test_prompts_beyond_the_models_positions_are_left_out(save_mistral, run, tmp_path, capsys):
    directory, _ = save_mistral(**FIELDS, max_position_embeddings=100)
    save_tokenizer(directory)
    long = ROWS[0] | {"question": "long " * 30}
    result = run(directory, directory, prompts=write_rows(tmp_path / "data.jsonl", [ROWS[1], long]))
    assert len(result["rows"]) == 1 and result["left_out"] == [f"{tmp_path / 'data.jsonl'}, line 2"]
    assert "left out, too long for the models' positions: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        ({"limit": 0}, "--limit is 0; expected at least 1"),
        ({"max-new-tokens": -1}, "--max-new-tokens is -1; expected at least 1"),
        ({"prompts": "none.txt"}, "none.txt: cannot be read as text"),
        ({"prompts": "empty.txt"}, "empty.txt: has no prompts"),
        ({"prompts": "bad.jsonl"}, r"bad.jsonl, line 2: column response is missing"),
        ({"prompts": "rows.jsonl", "model": "MODEL"}, "--model is the base of adapters, and neither A nor B is one"),
        (
            {"prompts": "rows.jsonl", "max-new-tokens": 600},
            "rows.jsonl: no prompt fits 512 positions with 600 new tokens",
        ),
        ({"prompts": "rows.jsonl", "template": "mistral-v3"}, "template mistral-v3 needs the control token"),
        ({"prompts": "rows.jsonl", "output": "rows.jsonl/page.html"}, "rows.jsonl: cannot be made "),
        ({"prompts": "data.json", "output": "data.html"}, "data.json: exists, and would be written with data.html"),
        ({"prompts": "rows.jsonl", "output": "mine.html"}, "mine.html: exists, and this command has not written it"),
        ({"prompts": "rows.jsonl", "output": "pages"}, "--output is pages; expected a name that ends in .html"),
    ],
)
def test_what_the_user_can_fix(options, message, base, run, tmp_path, monkeypatch):
    """Before a model is loaded."""
    monkeypatch.setattr(command, "load", None)
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "data.json").write_text(json.dumps(ROWS))
    (tmp_path / "mine.html").write_text("<title>mine</title>")
    write_rows(tmp_path / "bad.jsonl", [ROWS[0], {"system_prompt": "", "question": "q"}])
    (tmp_path / "lines.txt").write_text("One?\n")
    (tmp_path / "empty.txt").write_text("\n \n")
    options = {key: base[0] if value == "MODEL" else value for key, value in options.items()}
    with pytest.raises(UserError, match=message):
        run(base[0], base[0], **options)


def test_an_adapter_whose_base_is_not_here(adapter, run, base):
    directory, _ = adapter("one", 8)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "somebody/else"}))
    with pytest.raises(
        UserError, match="base_model_name_or_path is 'somebody/else'; expected a directory that is here; give"
    ):
        run(base[0], directory)
    assert run(base[0], directory, model=base[0])["b"]["adapter"] == str(directory)


# ---------------------------------------------------------------------------------------------------------- statistics


def by_hand(d: list[float]) -> float:
    """The share of all signs under which the sum is as far from 0, in plain Python."""
    sums = [abs(math.fsum(s * x for s, x in zip(signs, d))) for signs in itertools.product((1, -1), repeat=len(d))]
    return sum(s >= abs(math.fsum(d)) - 1e-9 for s in sums) / len(sums)


def test_the_paired_test_is_its_definition():
    draw = np.random.default_rng(1)
    for n in (1, 2, 5, 12):
        d = draw.normal(0.4, 1, n).tolist()
        found = paired(d)
        assert found.p_value == pytest.approx(by_hand(d)) and found.rows == n
        assert found.mean == pytest.approx(math.fsum(d) / n)
        if n > 1:
            error = statistics.stdev(d) / math.sqrt(n)
            assert found.standard_error == pytest.approx(error)
            reach = {2: 12.706205, 5: 2.7764451, 12: 2.2009852}[n] * error
            assert found.interval == pytest.approx((found.mean - reach, found.mean + reach), rel=1e-5)
    assert paired([0.25] * 4).p_value == 2 / 16
    assert paired([1.0, -1.0]).p_value == 1


def test_drawn_signs_estimate_the_share_of_all():
    d = np.random.default_rng(2).normal(0.45, 1, 15).tolist()
    exact, found = by_hand(d), paired(d).p_value
    assert 0.02 < exact < 0.5
    assert found == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / FLIPS))
    # the same in every run
    assert found == paired(d).p_value
    assert paired([1.0] * 100).p_value == 1 / (1 + FLIPS)


@pytest.mark.parametrize("degrees, value", [(1, 12.7062), (4, 2.77645), (30, 2.04227), (120, 1.97993), (9999, 1.96020)])
def test_quantiles_of_students_t(degrees, value):
    """From printed tables."""
    assert t_quantile(degrees) == pytest.approx(value, abs=2e-5)


def test_no_difference_and_one():
    assert paired([]).rows == 0 and math.isnan(paired([]).mean)
    one = paired([0.5])
    assert one.mean == 0.5 and math.isnan(one.standard_error) and one.p_value == 1
    assert math.isnan(paired([0.5, math.nan]).p_value)


# ---------------------------------------------------------------------------------------------------------------- page


def test_the_page_is_self_contained_and_escapes_everything(base, run, tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp;{{ 7 * 7 }}"
    row = {"system_prompt": evil, "question": evil, "response": evil}
    run(base[0], base[0], prompts=write_rows(tmp_path / f"<b>{'rows.jsonl'}", [row]))
    page = (tmp_path / "out" / "page.html").read_text()
    assert "<script>alert" not in page and "<img" not in page and "<b>rows" not in page and "{{ 7 * 7 }}" in page
    assert page.count("<script>") == 1 and "default-src &#39;none&#39;; script-src &#39;sha256-" in page
    # what a browser would fetch
    assert not re.search(r"""(?:src|href)=["'](?!data:,)|url\(|@import|https?:""", page)
