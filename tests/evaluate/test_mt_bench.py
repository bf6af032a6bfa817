"""MT-Bench: FastChat's files, answers by our engine, and judges that fail."""

import json
import math
import re
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
import torch

from minorca import load_model, load_tokenizer, render_chat
from minorca.errors import UserError
from minorca.evaluate import judge, mt_bench
from minorca.evaluate.judge import Judge, rating_of
from minorca.evaluate.mt_bench import MTBench, Question, summarize
from minorca.generate import generate
from minorca.generate.engine import Engine
from tests.evaluate.suite_files import PROMPTS, QUESTIONS, Endpoint, prompt_lines, write_lines
from tests.helpers import ROOT, random_mistral, save_tokenizer


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def endpoint():
    """endpoint(faults...): an endpoint; each fault is that of one request, in the order in which they come."""
    servers = []

    def start(*faults: str) -> Endpoint:
        server = Endpoint(iter(faults))
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A small random model with its tokenizer."""
    directory = tmp_path_factory.mktemp("models") / "talker"
    random_mistral(vocab_size=260, max_position_embeddings=4096).save_pretrained(directory)
    save_tokenizer(directory)
    return load_model(directory, torch.float32), load_tokenizer(directory)


@pytest.fixture
def bench(tmp_path, endpoint, monkeypatch):
    """bench(faults...): MT-Bench of QUESTIONS with an endpoint that fails so, without waiting between attempts."""
    questions = write_lines(tmp_path / "data" / "question.jsonl", QUESTIONS)
    prompts = write_lines(tmp_path / "data" / "judge_prompts.jsonl", prompt_lines())
    monkeypatch.setenv("OPENAI_API_KEY", "secret")

    def make(*faults: str) -> tuple[MTBench, Endpoint]:
        server = endpoint(*faults)
        read = MTBench.read(questions, server.url, prompts, "judge/1")
        return MTBench(read.questions, Judge(server.url, "judge/1", read.judge.prompts, delays=[0.0] * 3)), server

    return make


def evaluate(bench: MTBench, talker, directory: Path, identity: str = "model A"):
    model, tok = talker
    return bench.evaluate(model, tok, "chatml", directory, "tiny", identity, max_new_tokens=12)


# -------------------------------------------------------------------------------------------------------------- answers


def test_answers_and_judgments_are_fastchats(bench, talker, tmp_path):
    made, server = bench()
    result = evaluate(made, talker, tmp_path)
    model, tok = talker
    answers = {line["question_id"]: line for line in lines_of(tmp_path / "model_answer" / "tiny.jsonl")}
    assert sorted(answers) == [81, 111, 131]
    for question in QUESTIONS:
        answer = answers[question["question_id"]]
        assert answer["model_id"] == "tiny"
        (choice,) = answer["choices"]
        assert choice["index"] == 0
        # greedy categories: the same as from `generate`, the first answer part of the second prompt
        messages = []
        for turn, text in zip(question["turns"], choice["turns"], strict=True):
            messages.append({"role": "user", "content": turn})
            if question["category"] != "writing":
                prompt = render_chat(tok, messages, template="chatml")
                (ids,) = generate(model, [prompt], max_new_tokens=12, stop_ids=tok.stop_ids)
                assert text == tok.decode([i for i in ids if i not in tok.stop_ids]).strip()
            messages.append({"role": "assistant", "content": text})

    judgments = lines_of(tmp_path / "model_judgment" / "judge--1_single.jsonl")
    assert len(judgments) == len(server.requests) == 6
    assert {request["key"] for request in server.requests} == {"Bearer secret"}
    sent = {request["messages"][1]["content"]: request for request in server.requests}
    for line in judgments:
        turns = answers[line["question_id"]]["choices"][0]["turns"]
        question = next(question for question in QUESTIONS if question["question_id"] == line["question_id"])
        name = "single-math-v1" if question["category"] == "math" else "single-v1"
        fields = {"question": question["turns"][0], "answer": turns[0]}
        fields |= {f"question_{i}": text for i, text in enumerate(question["turns"], 1)}
        fields |= {f"answer_{i}": text for i, text in enumerate(turns, 1)}
        fields |= {f"ref_answer_{i}": text for i, text in enumerate(question.get("reference", []), 1)}
        name += "-multi-turn" if line["turn"] == 2 else ""
        assert line["judge"] == ["judge/1", name]
        assert line["user_prompt"] == PROMPTS[name].format(**fields)
        assert line["model"] == "tiny"
        assert line["score"] == len(line["user_prompt"]) % 10 + 1
        request = sent[line["user_prompt"]]
        assert request["path"] == "/v1/chat/completions"
        assert request["messages"][0] == {"role": "system", "content": f"You judge by {name}."}
        settings = {key: request[key] for key in ("model", "temperature", "max_tokens", "n")}
        assert settings == {"model": "judge/1", "temperature": 0, "max_tokens": 2048, "n": 1}
    assert result.averages[0].value == pytest.approx(sum(line["score"] for line in judgments) / 6)


def test_temperatures_by_category(talker, monkeypatch):
    seen = []
    add = Engine.add
    monkeypatch.setattr(Engine, "add", lambda self, request: seen.append(request.sampling) or add(self, request))
    model, tok = talker
    categories = {**mt_bench.TEMPERATURES, "poetry": 0.7}
    questions = [Question(i, category, ["Hi."], []) for i, category in enumerate(categories)]
    answers = list(mt_bench.answer_questions(model, tok, "chatml", questions, max_new_tokens=2))
    assert len(answers) == len(questions)
    expected = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1, "poetry": 0.7}
    assert [sampling.temperature for sampling in seen] == [expected.get(name, 0.0) for name in categories]
    assert all(sampling.seed is not None and sampling.top_p == 1 for sampling in seen)


def test_an_interrupted_run_goes_on(bench, talker, tmp_path, monkeypatch):
    """Killed within its answers, the last one half-written: the others stay, and all are those of one run."""
    whole, _ = bench()
    evaluate(whole, talker, tmp_path / "whole")
    made, server = bench()
    file = tmp_path / "parts" / "model_answer" / "tiny.jsonl"
    append = mt_bench.append_line

    def kill(file, value):
        append(file, value)
        raise KeyboardInterrupt

    monkeypatch.setattr(mt_bench, "append_line", kill)
    with pytest.raises(KeyboardInterrupt):
        evaluate(made, talker, tmp_path / "parts")
    (first,) = lines_of(file)
    with file.open("a") as stream:
        stream.write('{"question_id": 131, "choi')
    monkeypatch.setattr(mt_bench, "append_line", append)
    evaluate(made, talker, tmp_path / "parts")
    assert lines_of(file)[0] == first
    ours, theirs = (
        {line["question_id"]: line["choices"] for line in lines_of(tmp_path / run / "model_answer" / "tiny.jsonl")}
        for run in ("parts", "whole")
    )
    assert ours == theirs
    # and what is complete is not asked for again
    evaluate(made, talker, tmp_path / "parts")
    assert len(lines_of(file)) == 3
    assert len(server.requests) == 6


def test_answers_of_another_model_are_refused(bench, talker, tmp_path):
    made, server = bench()
    evaluate(made, talker, tmp_path)
    with pytest.raises(UserError, match="line 1: is another model's"):
        evaluate(made, talker, tmp_path, identity="model B")
    file = tmp_path / "model_answer" / "tiny.jsonl"
    other = Question(81, "writing", ["Write two lines.", "Shorter."], [])
    with pytest.raises(UserError, match="is another model's, or of other settings"):
        evaluate(MTBench([other], made.judge), talker, tmp_path)
    # judgments are of the answers that were judged
    answers = lines_of(file)
    answers[0]["choices"][0]["turns"][0] += "!"
    write_lines(file, answers)
    with pytest.raises(UserError, match="user_prompt is of another answer"):
        evaluate(made, talker, tmp_path)
    # and the same answers, made again, are not judged again
    file.unlink()
    evaluate(made, talker, tmp_path)
    assert len(server.requests) == 6


def test_a_place_that_cannot_be_written(bench, talker, tmp_path):
    made, _ = bench()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="tiny.jsonl: cannot be"):
        evaluate(made, talker, tmp_path / "file")
    (tmp_path / "model_answer" / "tiny.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match="tiny.jsonl: cannot be read and written"):
        evaluate(made, talker, tmp_path)


def test_a_conversation_longer_than_the_model(talker):
    model, tok = talker
    long = Question(7, "math", ["x" * 5000], ["y"])
    with pytest.raises(UserError, match=r"question 7 has 50\d\d tokens; the model's maximum length is 4096"):
        list(mt_bench.answer_questions(model, tok, "chatml", [long]))


# ------------------------------------------------------------------------------------------------------- failing judges


@pytest.mark.parametrize(
    "faults", [("500", "429", "closed"), ("empty", "503"), ("html", "bytes", "null"), ("deep",)], ids=" ".join
)
def test_failures_are_retried(faults, bench, talker, tmp_path):
    """All of them may meet one judgment, which is asked for four times."""
    made, server = bench(*faults)
    result = evaluate(made, talker, tmp_path)
    assert len(server.requests) == 6 + len(faults)
    assert result.averages[0].rows == 6
    assert len(lines_of(tmp_path / "model_judgment" / "judge--1_single.jsonl")) == 6


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_an_endpoint_says_when_to_ask_again(form, bench, talker, tmp_path, caplog):
    made, server = bench("503")
    moment = datetime.now(UTC) + timedelta(seconds=2)
    server.retry_after = "0.5" if form == "seconds" else format_datetime(moment, usegmt=True)
    evaluate(made, talker, tmp_path)
    (seconds,) = re.findall(r"answered 503 .*; the next attempt is in ([\d.]+) s", caplog.text)
    assert float(seconds) == 0.5 if form == "seconds" else 0 < float(seconds) <= 2


def test_a_judge_that_stays_silent_is_given_up(bench, talker, tmp_path):
    """As many judgments as are asked for at once use up their attempts; no more are tried."""
    made, server = bench(*["500"] * 200)
    many = [Question(n, "writing", [f"Write {n}."], []) for n in range(9)]
    with pytest.raises(UserError, match="9 of 9 judgments did not come; .*; the same command goes on with the rest"):
        evaluate(MTBench(many, made.judge), talker, tmp_path)
    assert 4 * judge.PARALLEL <= len(server.requests) <= 4 * (2 * judge.PARALLEL - 1)


@pytest.mark.parametrize("key, sent", [(" padded\r\n", "Bearer padded"), ("", None)])
def test_the_key_is_sent_without_white_space(key, sent, bench, talker, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    made, server = bench()
    monkeypatch.setenv("OPENAI_API_KEY", key)
    evaluate(made, talker, tmp_path)
    assert {request["key"] for request in server.requests} == {sent}


def test_a_key_that_cannot_be_one_is_not_shown(bench, monkeypatch):
    made, _ = bench()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\nkey")
    with pytest.raises(UserError, match="OPENAI_API_KEY has a character that a key cannot have") as caught:
        Judge(made.judge.url, "judge/1", made.judge.prompts)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("change, message", [({"score": "good"}, "score is 'good'; expected a rating"), ({}, None)])
def test_judgments_that_are_none(change, message, bench, talker, tmp_path):
    """A line of another schema is another's, or named; FastChat's own, without the system prompt, count."""
    made, _ = bench()
    evaluate(made, talker, tmp_path)
    file = tmp_path / "model_judgment" / "judge--1_single.jsonl"
    lines = lines_of(file)
    lines[0].pop("system_prompt")
    write_lines(file, [{"question_id": [1], "turn": 1}, lines[0] | change, *lines[1:]])
    answers = tmp_path / "model_answer" / "tiny.jsonl"
    write_lines(answers, [{"question_id": [1]}, *lines_of(answers)])
    again, server = bench()
    if message:
        with pytest.raises(UserError, match=f"line 2: {message}"):
            evaluate(again, talker, tmp_path)
    else:
        evaluate(again, talker, tmp_path)
        assert not server.requests


def test_failures_that_stay_are_reported_and_nothing_is_lost(bench, talker, tmp_path):
    """A broken endpoint after two judgments: those stay, and the next run asks for the four others only."""
    made, broken = bench("", "", *["500"] * 100)
    file = tmp_path / "model_judgment" / "judge--1_single.jsonl"
    with pytest.raises(UserError, match="4 of 6 judgments did not come") as caught:
        evaluate(made, talker, tmp_path)
    assert "answered 500 Internal Server Error: not now: 500" in str(caught.value)
    assert len(broken.requests) == 2 + 4 * 4
    before = lines_of(file)
    assert len(before) == 2
    healed, server = bench()
    result = evaluate(healed, talker, tmp_path)
    assert len(server.requests) == 4
    after = lines_of(file)
    assert after[:2] == before
    assert result.averages[0].value == pytest.approx(sum(line["score"] for line in after) / 6)


@pytest.mark.parametrize("status", ["401", "404", "307"])
def test_a_refusal_ends_the_run_at_once(bench, talker, tmp_path, status):
    made, server = bench(*[status] * 100)
    with pytest.raises(UserError, match=f"6 of 6 judgments did not come; .* answered {status}"):
        evaluate(made, talker, tmp_path)
    assert len(server.requests) <= judge.PARALLEL


def test_an_answer_that_cannot_be_judged_does_not_stop_the_others(bench, talker, tmp_path):
    made, server = bench("400")
    with pytest.raises(UserError, match="1 of 6 judgments did not come"):
        evaluate(made, talker, tmp_path)
    assert len(server.requests) == 6


def test_an_endpoint_that_is_not_there(bench, talker, tmp_path):
    made, server = bench()
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="6 of 6 .* cannot be reached"):
        evaluate(made, talker, tmp_path)


# --------------------------------------------------------------------------------------------------------------- scores


def test_ratings():
    """As FastChat's patterns read them."""
    assert rating_of("Rating: [[7]]") == 7
    assert rating_of("I first thought [5], then: [[6.5]]") == 6.5
    assert rating_of("Rating: [8]") == 8
    assert rating_of("Rating: 8") == -1


def test_the_score_is_the_mean_over_judgments():
    questions = [
        Question(1, "math", ["a", "b"], []),
        Question(2, "stem", ["a", "b"], []),
        Question(3, "stem", ["a"], []),
    ]
    scores = [(1, 1, 8), (1, 2, 4), (2, 1, 9), (2, 2, -1), (3, 1, 10)]
    judgments = [{"question_id": q, "turn": turn, "score": score} for q, turn, score in scores]
    result = summarize(questions, judgments)
    (average,) = result.averages
    assert average.value == pytest.approx(31 / 4)
    assert average.detail == "4 judgments of 3 questions, 1 without a rating"
    # residuals by question: -3.5, 1.25, 2.25
    assert average.stderr == pytest.approx(math.sqrt((3.5**2 + 1.25**2 + 2.25**2) * 3 / 2) / 4)
    members = {score.name: score.value for score in result.members}
    assert members == pytest.approx({"turn 1": 9.0, "turn 2": 4.0, "math": 6.0, "stem": 9.5})


def test_the_standard_error_is_that_of_means_of_questions():
    """Where all questions have two turns: the standard deviation of their means over the root of their number."""
    generator = torch.Generator().manual_seed(0)
    ratings = torch.randint(1, 11, (80, 2), generator=generator).double()
    questions = [Question(i, "math", ["a", "b"], []) for i in range(80)]
    judgments = [
        {"question_id": i, "turn": turn + 1, "score": ratings[i, turn].item()} for i in range(80) for turn in (0, 1)
    ]
    (average,) = summarize(questions, judgments).averages
    assert average.value == pytest.approx(ratings.mean().item())
    assert average.stderr == pytest.approx((ratings.mean(1).std() / math.sqrt(80)).item())


def test_a_judge_that_never_rates(bench, talker, tmp_path):
    made, _ = bench(*["unrated"] * 6)
    with pytest.raises(UserError, match="--judge-model gave no rating"):
        evaluate(made, talker, tmp_path)
    assert [line["score"] for line in lines_of(tmp_path / "model_judgment" / "judge--1_single.jsonl")] == [-1] * 6


# ---------------------------------------------------------------------------------------------------------------- files


def test_references_come_from_fastchats_directory(tmp_path):
    """reference_answer/gpt-4.jsonl beside the questions, before the questions' own."""
    file = write_lines(tmp_path / "question.jsonl", QUESTIONS)
    answer = {"question_id": 111, "choices": [{"index": 0, "turns": ["four", "twelve"]}]}
    write_lines(tmp_path / "reference_answer" / "gpt-4.jsonl", [answer])
    read = {question.id: question.references for question in mt_bench.read_questions(file, "other")}
    assert read == {81: [], 111: ["four", "twelve"], 131: []}
    write_lines(tmp_path / "reference_answer" / "gpt-4.jsonl", [answer | {"choices": []}])
    with pytest.raises(UserError, match=r"gpt-4.jsonl, line 1: choices is \[\]"):
        mt_bench.read_questions(file, "other")


@pytest.mark.parametrize(
    "number, change, message",
    [
        (1, {"question_id": "81"}, "line 1: question_id is '81'; expected an integer"),
        (3, {"question_id": 81}, "line 3: question_id is 81; expected one that no earlier line has"),
        (2, {"category": None}, "line 2: category is None"),
        (1, {"turns": []}, r"line 1: turns is \[\]; expected a list of one or two texts"),
        (1, {"turns": ["a", 2]}, "line 1: turns is"),
        (2, {"reference": ["one"]}, "line 2: reference is .*gpt-4.jsonl: math is judged against them"),
        (3, {"category": "coding"}, "line 3: reference is None"),
    ],
)
def test_wrong_questions_name_file_line_and_field(tmp_path, number, change, message):
    lines = [dict(line) for line in QUESTIONS]
    lines[number - 1] |= change
    with pytest.raises(UserError, match=f"question.jsonl, {message}"):
        mt_bench.read_questions(write_lines(tmp_path / "question.jsonl", lines), "judge")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"type": "pairwise"}, "type is 'pairwise'; expected single"),
        ({"output_format": "[[A]]"}, "output_format is"),
        ({"system_prompt": None}, "system_prompt is None; expected text"),
        ({"prompt_template": "{question} {answer.secret}"}, "prompt_template has the fields"),
        ({"prompt_template": "{question"}, "prompt_template has the fields"),
    ],
)
def test_wrong_judge_prompts_name_file_line_and_field(tmp_path, change, message):
    file = write_lines(tmp_path / "judge_prompts.jsonl", prompt_lines(**change))
    with pytest.raises(UserError) as caught:
        judge.read_prompts(file)
    assert re.search(f"judge_prompts.jsonl, line 2: {message}", str(caught.value.problems[0]))


def test_files_that_are_not_there_or_are_no_json(tmp_path):
    with pytest.raises(UserError, match="has no prompt of the name single-v1;"):
        judge.read_prompts(write_lines(tmp_path / "judge_prompts.jsonl", prompt_lines()[:1]))
    with pytest.raises(UserError, match="question.jsonl"):
        mt_bench.read_questions(tmp_path / "question.jsonl", "judge")
    (tmp_path / "question.jsonl").write_text("{}\n{\n")
    with pytest.raises(UserError, match="line 2"):
        mt_bench.read_questions(tmp_path / "question.jsonl", "judge")
    with pytest.raises(UserError, match="is file:///etc/passwd; expected a URL"):
        Judge("file:///etc/passwd", "model", {})


@pytest.mark.slow
def test_our_own_server_judges(bench, talker, tmp_path):
    """A random model rates nothing, but every judgment comes."""
    directory = tmp_path / "judge"
    random_mistral(vocab_size=260, num_hidden_layers=1, max_position_embeddings=4096).save_pretrained(directory)
    save_tokenizer(directory)
    command = [sys.executable, "-m", "minorca.serve", "--model", str(directory), "--port", "0", "--template", "chatml"]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout
            address = re.search("http://[^ ]*:[0-9]+", process.stdout.readline())
            assert address
            made, _ = bench()
            ours = MTBench(made.questions, Judge(f"{address[0]}/v1", "judge", made.judge.prompts))
            with pytest.raises(UserError, match="gave no rating"):
                evaluate(ours, talker, tmp_path)
        finally:
            process.terminate()
    lines = lines_of(tmp_path / "model_judgment" / "judge_single.jsonl")
    assert len(lines) == 6
    assert all(line["judgment"] for line in lines)
