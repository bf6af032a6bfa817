"""`python -m minorca.evaluate --suite`: what it prints and writes, and what it says of what it cannot do."""

import importlib.util
import json
import threading

import pytest

from minorca.errors import UserError
from minorca.evaluate import __main__ as command
from minorca.evaluate import suites
from tests.evaluate.suite_files import QUESTIONS, ROWS, Endpoint, prompt_lines, write_lines, write_rows
from tests.helpers import evaluate_on_two_ranks, save_tokenizer

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="needs lm_eval")


@pytest.fixture
def evaluate(save_mistral, tmp_path, capsys):
    """evaluate(*options): what the command prints and writes of a small model."""
    model, _ = save_mistral(vocab_size=260, max_position_embeddings=4096)
    save_tokenizer(model)

    def run(*options):
        file = tmp_path / "scores.json"
        given = ["--model", model, "--dtype", "float32", "--no-cache", "--output", file, *options]
        capsys.readouterr()
        command.main([str(word) for word in given])
        return capsys.readouterr().out, json.loads(file.read_text())

    run.model = model
    return run


def test_a_suite_is_shown_beside_published_scores_and_written(evaluate, tmp_path):
    write_rows(tmp_path / "data", ROWS)
    printed, written = evaluate("--suite", "gpt4all", "--data", tmp_path / "data", "--limit", 4, "--name", "ours")
    assert (tmp_path / "scores.md").read_text() in printed
    assert "| **mean of acc_norm, else acc** |" in printed and "| | ours | Mistral-7B-v0.1 |" in printed
    assert (tmp_path / "scores.png").stat().st_size > 10_000
    assert "\nours: float32, without BOS (as the tokenizer does), no chat template.\n" in printed
    suite = written["suites"]["gpt4all"]
    assert len(suite["members"]) == 7
    for member in suite["members"]:
        # where lm_eval has no acc_norm, acc
        metric = "acc" if member["name"] in ("boolq", "winogrande") else "acc_norm"
        assert member["value"] == pytest.approx(100 * written["results"][member["name"]][f"{metric},none"])
        assert written["n-shot"][member["name"]] == 0
        assert (member["rows"], member["available"]) == (4, 6)
    (average,) = suite["averages"]
    assert average["value"] == pytest.approx(sum(member["value"] for member in suite["members"]) / 7)
    assert (average["rows"], average["available"]) == (28, 42)
    assert written["minorca"]["requests"] > 7 * 4


@pytest.fixture
def mt_bench(tmp_path):
    """The endpoint that judges, and mt_bench(DIRECTORY): the options of a question whose files lie there."""
    server = Endpoint(iter(()))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def options(directory):
        given = {
            "--suite": "mt-bench",
            "--questions": write_lines(directory / "question.jsonl", QUESTIONS),
            "--judge-prompts": write_lines(directory / "judge_prompts.jsonl", prompt_lines()),
            "--judge": server.url,
            "--judge-model": "gpt-4",
            "--limit": 1,
            "--name": "tiny",
            "--template": "chatml",
        }
        return [word for pair in given.items() for word in pair]

    yield server, options
    server.shutdown()
    server.server_close()


def answers_in(directory) -> list[dict]:
    lines = (directory / "model_answer" / "tiny.jsonl").read_text().splitlines()
    return [{key: json.loads(line)[key] for key in ("question_id", "choices")} for line in lines]


def test_mt_bench_by_the_command(evaluate, mt_bench, tmp_path):
    server, options = mt_bench
    options = options(tmp_path)
    printed, written = evaluate(*options, "--system", "Be brief.")
    assert "\ntiny: float32, MT-Bench: chat template chatml, system prompt 'Be brief.'.\n" in printed
    assert written["minorca"]["mt_bench"] == {"template": "chatml", "system": "Be brief."}
    (answer,) = answers_in(tmp_path)
    assert answer["question_id"] == QUESTIONS[0]["question_id"]
    assert len(server.requests) == 2
    (average,) = written["suites"]["mt-bench"]["averages"]
    judgments = (tmp_path / "model_judgment" / "gpt-4_single.jsonl").read_text().splitlines()
    assert average["value"] == pytest.approx(sum(json.loads(line)["score"] for line in judgments) / 2)
    # a system prompt of the judge's gives other judgments
    path = tmp_path / "judge_prompts.jsonl"
    path.write_text(path.read_text().replace("You judge", "You rate"))
    with pytest.raises(UserError, match=r"gpt-4_single.jsonl, line 1: user_prompt is of another answer .*, or prompt"):
        evaluate(*options, "--system", "Be brief.")
    # another system prompt gives other answers
    with pytest.raises(UserError, match="is another model's, or of other settings"):
        evaluate(*options)


def test_a_failing_judge_costs_the_other_suites_nothing(evaluate, mt_bench, tmp_path, monkeypatch):
    """Of seed, the others are shown and written before the error ends the command."""
    server, options = mt_bench
    small = {name: suite for name, suite in suites.SUITES.items() if name == "gpt4all"}
    monkeypatch.setattr(suites, "SUITES", small)
    monkeypatch.setattr(server, "plan", iter(["400"] * 99))
    write_rows(tmp_path / "data", ROWS)
    options = [word if word != "mt-bench" else "seed" for word in options(tmp_path)]
    with pytest.raises(UserError, match="2 of 2 judgments did not come; question 81, turn 1: .* answered 400"):
        evaluate(*options, "--data", tmp_path / "data")
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["suites"].keys() == {"gpt4all"} and "gpt4all/piqa" in written["results"]
    assert written["minorca"]["template"] is None and written["minorca"]["mt_bench"]["template"] == "chatml"


@pytest.mark.slow
def test_one_of_two_ranks_asks_and_is_judged(evaluate, mt_bench, tmp_path):
    server, options = mt_bench
    evaluate(*options(tmp_path / "one"))
    assert len(server.requests) == 2
    evaluate_on_two_ranks(["--model", evaluate.model, "--dtype", "float32", *options(tmp_path / "two")])
    assert len(server.requests) == 4 and answers_in(tmp_path / "two") == answers_in(tmp_path / "one")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--suite", "gpt4al"], "invalid choice: 'gpt4al'"),
        (["--suite", "gpt4all", "--tasks", "piqa"], "not allowed with argument"),
        (["--suite", "gpt4all", "--num-fewshot", 1], "--num-fewshot cannot be combined with --suite"),
        (["--suite", "gpt4all", "--judge", "http://x"], "--judge needs --suite mt-bench"),
        (
            ["--suite", "seed", "--questions", "q", "--judge", "http://x", "--judge-model", "m"],
            "--judge-prompts is missing",
        ),
        (["--tasks", "piqa", "--name", "ours"], "--name needs --suite"),
        (["--tasks", "piqa", "--data", "there"], "--data needs --suite"),
        (["--suite", "mt-bench", "--no-bos"], "--bos has no effect on MT-Bench; leave it out"),
        (["--suite", "gpt4all", "--name", "a/b"], "--name is a/b; expected a name without a path"),
        (["--suite", "gpt4all", "--output", "scores.md"], "--output is where the table or the picture goes"),
        (["--suite", "gpt4all", "--system", "Hi."], "--system needs --suite mt-bench"),
        (["--suite", "gpt4all", "--template", "chatml"], "--template needs --chat"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(UserError, match=message):
        command.main(["--model", "nowhere", *map(str, options)])
