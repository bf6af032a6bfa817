"""`python -m minorca.evaluate --suite`: what it prints and writes, and what it says of what it cannot do."""

import importlib.util
import json
import threading

import pytest

from minorca.errors import UserError
from minorca.evaluate import __main__ as command
from tests.evaluate.suite_files import QUESTIONS, ROWS, Endpoint, prompt_lines, write_lines, write_rows
from tests.helpers import save_tokenizer

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


def test_mt_bench_by_the_command(evaluate, tmp_path):
    server = Endpoint(iter(()))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        questions = write_lines(tmp_path / "bench" / "question.jsonl", QUESTIONS)
        prompts = write_lines(tmp_path / "bench" / "judge_prompts.jsonl", prompt_lines())
        options = [
            "--questions",
            questions,
            "--judge-prompts",
            prompts,
            "--judge",
            server.url,
            "--judge-model",
            "gpt-4",
        ]
        options += ["--suite", "mt-bench", "--limit", 1, "--name", "tiny", "--template", "chatml"]
        _, written = evaluate(*options, "--system", "Be brief.")
        (line,) = (tmp_path / "bench" / "model_answer" / "tiny.jsonl").read_text().splitlines()
        assert json.loads(line)["question_id"] == QUESTIONS[0]["question_id"]
        assert len(server.requests) == 2
        (average,) = written["suites"]["mt-bench"]["averages"]
        judgments = (tmp_path / "bench" / "model_judgment" / "gpt-4_single.jsonl").read_text().splitlines()
        assert average["value"] == pytest.approx(sum(json.loads(line)["score"] for line in judgments) / 2)
        # another system prompt gives other answers
        with pytest.raises(UserError, match="is another model's, or of other settings"):
            evaluate(*options)
    finally:
        server.shutdown()
        server.server_close()


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
