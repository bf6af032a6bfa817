"""`python -m minorca.evaluate --suite`: what it prints and writes, and what it says of what it cannot do."""

import importlib.util
import json
import threading

import pytest

from minorca.errors import UserError
from minorca.evaluate import __main__ as command
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
    suite = written["suites"]["gpt4all"]
    assert len(suite["members"]) == 7
    for member in suite["members"]:
        # where lm_eval has no acc_norm, acc
        metric = "acc" if member["name"] in ("boolq", "winogrande") else "acc_norm"
        assert member["value"] == pytest.approx(100 * suite["results"][member["name"]][f"{metric},none"])
        assert suite["n-shot"][member["name"]] == 0
        assert (member["rows"], member["available"]) == (4, 6)
    (average,) = suite["averages"]
    assert average["value"] == pytest.approx(sum(member["value"] for member in suite["members"]) / 7)
    assert (average["rows"], average["available"]) == (28, 42)
    assert written["minorca"]["requests"] > 7 * 4


@pytest.fixture
def mt_bench(tmp_path):
    """The judge's requests, and mt_bench(DIRECTORY): the options of a question whose files lie there."""
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

    yield server.requests, options
    server.shutdown()
    server.server_close()


def answers_in(directory) -> list[dict]:
    lines = (directory / "model_answer" / "tiny.jsonl").read_text().splitlines()
    return [{key: json.loads(line)[key] for key in ("question_id", "choices")} for line in lines]


def test_mt_bench_by_the_command(evaluate, mt_bench, tmp_path):
    requests, options = mt_bench
    options = options(tmp_path)
    _, written = evaluate(*options, "--system", "Be brief.")
    (answer,) = answers_in(tmp_path)
    assert answer["question_id"] == QUESTIONS[0]["question_id"]
    assert len(requests) == 2
    (average,) = written["suites"]["mt-bench"]["averages"]
    judgments = (tmp_path / "model_judgment" / "gpt-4_single.jsonl").read_text().splitlines()
    assert average["value"] == pytest.approx(sum(json.loads(line)["score"] for line in judgments) / 2)
    # another system prompt gives other answers
    with pytest.raises(UserError, match="is another model's, or of other settings"):
        evaluate(*options)


@pytest.mark.slow
def test_one_of_two_ranks_asks_and_is_judged(evaluate, mt_bench, tmp_path):
    requests, options = mt_bench
    evaluate(*options(tmp_path / "one"))
    assert len(requests) == 2
    evaluate_on_two_ranks(["--model", evaluate.model, "--dtype", "float32", *options(tmp_path / "two")])
    assert len(requests) == 4 and answers_in(tmp_path / "two") == answers_in(tmp_path / "one")


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
        (["--suite", "gpt4all", "--name", "a/b"], "--name is a/b; expected a name without a path"),
        (["--suite", "gpt4all", "--output", "scores.md"], "--output is where the table or the picture goes"),
        (["--suite", "gpt4all", "--system", "Hi."], "--system needs --suite mt-bench"),
        (["--suite", "gpt4all", "--template", "chatml"], "--template needs --chat"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(UserError, match=message):
        command.main(["--model", "nowhere", *map(str, options)])
