"""What `python -m minorca.evaluate` prints and writes, and what it says of what it cannot do."""

import importlib.util
import json
import re
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("lm_eval")
import datasets
from lm_eval.tasks._yaml_loader import load_yaml

from minorca import UserError
from minorca.evaluate import __main__ as command
from minorca.evaluate.scoring import Scorer
from minorca.evaluate.task_files import load_tasks
from minorca.files.atomic import sha256
from minorca.replay import __main__ as replay
from tests.evaluate.harness_oracle import MIRRORED, TASKS, rows_of, save_bpe, write_tasks
from tests.helpers import ENVIRONMENT, evaluate_on_two_ranks, random_adapter


@pytest.fixture
def evaluate(save_mistral, tmp_path, capsys):
    """evaluate(*options): the command's output and what it wrote, of a small model on local tasks."""
    sizes = {"vocab_size": 400, "intermediate_size": 128, "max_position_embeddings": 448}
    directory, model = save_mistral(**sizes, bos_token_id=0, eos_token_id=1)
    save_bpe(directory, True)
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_tasks(folder)

    def run(*options, tasks="arc_local"):
        given = ["--model", directory, "--include-path", folder, "--tasks", tasks, "--output", tmp_path / "out.json"]
        given += ["--dtype", "float32", "--cache", tmp_path / "results"]
        capsys.readouterr()
        command.main([str(word) for word in (*given, *options)])
        return capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())

    run.folder, run.model, run.base, run.path = folder, directory, model, tmp_path
    return run


def write_task(folder, rows=None, **changes) -> None:
    """A task of its own, mended or broken by `changes`."""
    data = folder / "mine.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows or rows_of("arc")))
    config = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices.text}}",
        "doc_to_target": "{{choices.label.index(answerKey)}}",
    } | changes
    (folder / "mine.yaml").write_text(json.dumps(config))


def test_results_are_printed_written_and_kept(evaluate):
    printed, written = evaluate("--limit", 4, "--num-fewshot", 1, "--log-samples")
    assert "|arc_local|" in printed.replace(" ", "") and "with BOS (as the tokenizer does)" in printed
    assert written["results"]["arc_local"]["acc,none"] in (0, 0.25, 0.5, 0.75, 1)
    assert written["n-shot"] == {"arc_local": 1} and len(written["samples"]["arc_local"]) == 4
    assert written["configs"]["arc_local"]["dataset_path"] == "json"
    ours = written["minorca"]
    assert ours["bos"] is True and ours["template"] is None and ours["truncated"] == 0
    assert ours["requests"] > 12 and 0 < ours["tokens_computed"] < ours["tokens_shared"]
    _, again = evaluate("--limit", 4, "--num-fewshot", 1)
    assert again["results"] == written["results"] and again["minorca"]["tokens_computed"] == 0
    receipt = again["receipt"]
    assert receipt["base"] == {"model.safetensors": sha256(evaluate.model / "model.safetensors")}
    replay.main([str(evaluate.path / "out.json")])
    again["results"]["arc_local"]["acc,none"] += 0.25
    (evaluate.path / "out.json").write_text(json.dumps(again))
    with pytest.raises(UserError, match="results/arc_local/acc,none is not as the evaluation wrote it"):
        replay.main([str(evaluate.path / "out.json")])
    assert "samples" not in again


def test_a_task_of_several_groups_and_tags_is_evaluated_once(evaluate):
    for name, members in (("whole", ["arc_local", "part"]), ("part", ["winogrande_local"])):
        (evaluate.folder / f"{name}.yaml").write_text(json.dumps({"group": name, "task": members}))
    _, written = evaluate("--limit", 1, tasks="arc_local,part,whole,w*")
    assert written["results"].keys() == {"whole", "part", "arc_local", "winogrande_local"}
    _, written = evaluate("--limit", 1, tasks="arc_*,local_tasks,arc_local")
    assert len(written["results"]) == len(MIRRORED)
    (evaluate.folder / "other.yaml").write_text(json.dumps({"group": "other", "task": ["arc_local"]}))
    with pytest.raises(UserError, match="--tasks has the groups other and whole, which share tasks such as arc_local"):
        evaluate(tasks="other,whole")


def test_cut_requests_are_counted(evaluate):
    """The prompt of TruthfulQA is longer than the model."""
    printed, written = evaluate("--limit", 2, tasks="truthfulqa_mc1_local")
    count = written["minorca"]["truncated"]
    assert count == written["minorca"]["requests"] > 0
    assert f"{count} requests were cut on the left, to the model's 448 positions" in printed
    assert "were cut" not in evaluate("--limit", 2)[0]


def test_options_reach_the_model(evaluate):
    """BOS, chat, the adapter and quantization each change what is computed; two adapters share nothing."""
    adapters = [evaluate.path / name for name in "ab"]
    adapted = random_adapter(evaluate.base, adapters[0], ("q", "v"))
    random_adapter(adapted.unload(), adapters[1], ("q", "v"), lora_alpha=9)
    variants = [(), ("--no-bos",), ("--chat",), ("--adapter", adapters[0]), ("--adapter", adapters[1])]
    variants += [("--quantize", "nf4"), ("--quantize", "nf4", "--adapter", adapters[0]), ("--dtype", "bfloat16")]
    found = []
    for options in variants:
        _, written = evaluate("--limit", 2, "--log-samples", *options)
        assert written["minorca"]["tokens_computed"] > 0, options
        found.append([sample["resps"] for sample in written["samples"]["arc_local"]])
        assert written["minorca"]["template"] == ("chatml" if options == ("--chat",) else None)
    assert all(found.count(each) == 1 for each in found)


FUNCTIONS = """
def mean_of(values):
    return sum(values) / len(values)

def half(references, predictions, **_):
    return 0.5

def right(doc, results):
    return {"right": float(max(results)[0] == results[0][0])}
"""


@pytest.mark.parametrize(
    "changes",
    [
        {"metric_list": [{"metric": "acc", "aggregation": "!function own.mean_of"}]},
        {
            "process_results": "!function own.right",
            "metric_list": [{"metric": "right", "aggregation": "!function own.mean_of"}],
        },
        {
            "output_type": "generate_until",
            "doc_to_choice": None,
            "doc_to_target": "{{answerKey}}",
            "metric_list": [{"metric": "!function own.half", "aggregation": "mean", "higher_is_better": True}],
        },
        {"doc_to_text": "{{hint if hint is defined else question}}"},
        {"fewshot_split": "test", "num_fewshot": 1, "fewshot_config": {"doc_to_target": "because {{answerKey}}"}},
        {"generation_kwargs": {"max_gen_toks": None}},
        {"dataset_kwargs": {"data_dir": "DIRECTORY", "data_files": {"test": "mine.jsonl"}}},
    ],
    ids=["aggregation", "process_results", "metric", "is defined", "examples' answers", "no length", "data_dir"],
)
def test_what_lm_eval_takes_is_not_refused(changes, tmp_path):
    (tmp_path / "own.py").write_text(FUNCTIONS)
    write_task(tmp_path, **changes)
    path = tmp_path / "mine.yaml"
    # a function is a tag of YAML, and no text
    text = re.sub(r'"(!function [\w.]+)"', r"\1", path.read_text()).replace("DIRECTORY", str(tmp_path))
    path.write_text(text)
    assert len(load_tasks(["mine"], tmp_path).tasks) == 1


def test_a_class_writes_as_it_likes(tmp_path):
    (tmp_path / "own.py").write_text(
        "from lm_eval.api.task import ConfigurableTask\n\n"
        "class Own(ConfigurableTask):\n"
        "    def __init__(self, config=None):\n"
        "        super().__init__(config={k: v for k, v in config.items() if k != 'class'})\n\n"
        "    def doc_to_text(self, doc):\n        return doc['question'].upper()\n"
    )
    write_task(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text(path.read_text().replace("{", "{class: !function own.Own, ", 1))
    assert len(load_tasks(["mine"], tmp_path).tasks) == 1


# lm_eval's own files, each with rows of its schema
OWN = {
    "super_glue/cb/default.yaml": [{"premise": "a b", "hypothesis": "c", "label": n} for n in range(3)],
    "super_glue/copa/default.yaml": [
        {"premise": "It rained.", "choice1": "A b.", "choice2": "C d.", "question": "cause", "label": n} for n in (0, 1)
    ],
    "gsm8k/gsm8k-cot.yaml": [{"question": "q", "answer": "x #### 3"}] * 3,
    "toxigen/toxigen.yaml": [{"text": "t", "toxicity_ai": n, "toxicity_human": n} for n in (5.0, 1.0)],
    "triviaqa/default.yaml": [{"question": f"q{n}", "answer": {"aliases": ["a", "b"], "value": "a"}} for n in range(7)],
    "mgsm/direct/mgsm_direct_en.yaml": [
        {"question": "q", "answer": None, "answer_number": 3, "equation_solution": None}
    ]
    * 3,
    "glue/qqp/default.yaml": [{"question1": "a", "question2": "b", "label": n} for n in (0, 1)],
    "bbh/zeroshot/boolean_expressions.yaml": [{"input": "q", "target": "True"}] * 3,
    "blimp/adjunct_island.yaml": [{"sentence_good": "a b", "sentence_bad": "b a"}] * 3,
}


@pytest.mark.parametrize("file", OWN)
def test_lm_evals_own_files_are_not_refused(file, tmp_path):
    config = load_yaml(TASKS / file, resolve_func=False)
    keys = ("training_split", "validation_split", "test_split", "fewshot_split")
    splits = {config.get(key) for key in keys} | {(config.get("fewshot_config") or {}).get("split")} - {None}
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in OWN[file]))
    own = {"include": str(TASKS / file), "task": "mine", "dataset_path": "json", "dataset_name": None, "tag": None}
    own["dataset_kwargs"] = {"data_files": {split: str(data) for split in splits if split}}
    (tmp_path / "mine.yaml").write_text(json.dumps(own))
    assert len(load_tasks(["mine"], tmp_path).tasks) == 1


def test_bad_input_is_named(evaluate, monkeypatch):
    """Unknown tasks with the nearest names, what a task's file and its data lack, options that contradict."""

    def says(message, *options, **changes):
        with pytest.raises(UserError, match=message):
            evaluate(*options, **changes)

    write_task(evaluate.folder)
    printed, _ = evaluate(tasks="mine, arc_*,")
    assert "mine" in printed
    mine = evaluate.path / "notes.json"
    mine.write_text('{"results": "mine"}')
    says("notes.json: exists, and this command has not written it; choose another --output", "--output", mine)
    assert mine.read_text() == '{"results": "mine"}'
    for changes, message in (
        ({"doc_to_txt": "a"}, r"mine\.yaml: doc_to_txt is an unknown key; did you mean doc_to_text\?"),
        ({"output_type": "choice"}, r"mine\.yaml: output_type is 'choice'; expected one of loglikelihood,"),
        (
            {"doc_to_text": "{{questoin}}"},
            r"mine\.yaml: doc_to_text names the column questoin.*mean question\?",
        ),
        ({"doc_to_target": "answerkey"}, r"mine\.yaml: doc_to_target names the column answerkey.*mean answerKey\?"),
        ({"doc_to_text": "{{question"}, r"mine\.yaml: doc_to_text is not a valid template"),
        ({"dataset_kwargs": {"data_files": "gone.jsonl"}}, r"mine\.yaml: dataset_kwargs.data_files names gone\.jsonl"),
        ({"doc_to_choice": "{{choices.txet}}"}, r"mine\.jsonl, row 1: doc_to_choice cannot be made .*'txet'"),
        (
            {"dataset_path": "nobody/nothing", "dataset_kwargs": None},
            r"mine\.yaml: dataset_path names nobody/nothing, which cannot be loaded .*--include-path",
        ),
        ({"test_split": "tset"}, r"mine\.yaml: test_split is 'tset', which the data lack"),
        ({"metric_list": [{"metric": "acuracy"}]}, r"mine\.yaml: metric_list has .*acuracy; did you mean acc"),
        ({"process_docs": "no"}, r"mine\.yaml: task mine cannot be loaded: TypeError"),
        ({"metric_list": ["acc"]}, r"mine\.yaml: metric_list is 'acc'; expected a mapping with a metric"),
        ({"metric_list": {"metric": "acc"}}, r"mine\.yaml: metric_list is .*; expected a list of mappings"),
        ({"metric_list": [{"metric": "acc", "aggregation": "meen"}]}, r"unknown aggregation meen; did you mean mean"),
        ({"num_fewshot": "3"}, r"mine\.yaml: num_fewshot is '3'; expected a number, 0 or more"),
        ({"dataset_kwargs": "x"}, r"mine\.yaml: dataset_kwargs is 'x'; expected a mapping"),
        ({"dataset_kwargs": {"data_files": {"test": 5}}}, r"data_files is 5; expected a path, or a list of paths"),
        ({"doc_to_target": "{{answerKey}}"}, r"mine\.jsonl, row 1: doc_to_target is 'A', which is none of the choices"),
        ({"doc_to_target": "{{[9]}}"}, r"mine\.jsonl, row 1: doc_to_target is 9, with 4 choices"),
        # what a model that knows nothing finds
        ({"description": "{{level}}"}, r"mine\.yaml: mine cannot be evaluated \(UndefinedError: 'level'"),
        (
            {"metric_list": [{"metric": "perplexity"}]},
            "metric_list has perplexity, which mine, of multiple_choice, does",
        ),
        (
            {"filter_list": [{"name": "x", "filter": [{"function": "regex", "patern": "a"}]}]},
            "cannot be evaluated .*patern",
        ),
        ({"repeats": 0}, r"mine\.yaml: mine cannot be evaluated"),
        ({"doc_to_target": "answer"}, "doc_to_target names the column answer, which the data lack"),
        ({"doc_to_choice": "options"}, "doc_to_choice names the column options, which the data lack"),
        ({"doc_to_choice": ["a", 5]}, r"row 1: doc_to_choice is \['a', 5\]; expected a list of texts"),
        ({"num_fewshot": 100}, r"mine\.yaml: num_fewshot is 100, and mine has 8 rows"),
        ({"dataset_path": None}, r"mine\.yaml: dataset_path is missing"),
        ({"doc_to_choice": None}, r"mine\.yaml: doc_to_choice is missing"),
        ({"unsafe_code": True}, "--tasks has mine, which runs code that a model writes"),
        ({"doc_to_image": ["question"]}, "--tasks has mine, which shows pictures"),
    ):
        write_task(evaluate.folder, **changes)
        says(message, tasks="mine")
    for text, message in (("", "has no rows"), ('{"a": 1}\n{"b"', "line 2: ")):
        write_task(evaluate.folder)
        (evaluate.folder / "mine.jsonl").write_text(text)
        says(rf"mine\.jsonl.* {message}", tasks="mine")
    rows = rows_of("arc")
    # examples that equal the question are none
    write_task(evaluate.folder, rows[:4] * 2, fewshot_split="test")
    says("--num-fewshot is 7, and mine has 8 rows to take examples from", "--num-fewshot", 7, tasks="mine")
    rows[2]["question"] = None
    write_task(evaluate.folder, rows)
    says(r"mine\.jsonl, row 3: doc_to_text .*a column that it writes is null", tasks="mine")
    rows = rows_of("arc")
    rows[2]["answerKey"] = "F"
    write_task(evaluate.folder, rows)
    says(r"mine\.jsonl, row 3: doc_to_target cannot be made of it \(.*'F' is not in list", tasks="mine")
    write_task(evaluate.folder, rows, doc_to_target=7)
    says(r"mine\.jsonl, row 1: doc_to_target is 7, with 4 choices; expected 0 to 3", tasks="mine")
    options = {"output_type": "generate_until", "doc_to_choice": None, "generation_kwargs": {"until": [], "beams": 2}}
    write_task(evaluate.folder, **options)
    says(r"mine\.yaml: generation_kwargs has the unknown beams; expected until, do_sample", tasks="mine")
    for members, message in (
        ("arc_local", "task is 'arc_local'; expected a list of tasks and groups"),
        ([{"task": ["arc_local"]}], "task has .*; expected a name, or a mapping with the name as task or group"),
        (["arc_local", "mine"], "task has mine, which is in itself"),
        ([], r"task is \[\]; expected a list"),
    ):
        (evaluate.folder / "mine.yaml").write_text(json.dumps({"group": "mine", "task": members}))
        says(rf"mine\.yaml: {message}", tasks="mine")
    (evaluate.folder / "mine.yaml").write_text("task: 7")
    says(r"mine\.yaml: task is 7; expected a name", tasks="mine")
    (evaluate.folder / "mine.yaml").write_text("task: [")
    says(r"mine\.yaml: cannot be read as a task", tasks="mine")
    (evaluate.folder / "mine.yaml").unlink()
    says("--tasks names no task", tasks=",")
    # without a test split, questions are taken from the same rows
    says("--num-fewshot is 8, and hellaswag_local has 8 rows", "--num-fewshot", 8, tasks="hellaswag_local")
    for options, message in (
        (("--limit", 0), "--limit must be at least 1"),
        (("--num-fewshot", -1), "--num-fewshot must be 0 or more"),
        (("--num-fewshot", 9), "--num-fewshot is 9, and arc_local has 8 rows to take examples from"),
        (("--fewshot-in-one-turn",), "--fewshot-in-one-turn needs --chat"),
        (("--include-path", "nowhere"), "--include-path is not a directory"),
        (("--output", evaluate.folder), "tasks: is not a file that can be written; choose another --output"),
        (("--output", evaluate.folder / "mine.jsonl" / "out.json"), r"mine\.jsonl: cannot be made .*another --output"),
    ):
        says(message, *options)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    says("lm_eval is not installed; pip install")


SHUFFLED = """
import random

def process_docs(rows):
    def shuffle(row):
        words = row["question"].split()
        random.shuffle(words)
        return row | {"question": " ".join(words)}

    return rows.map(shuffle)
"""


def test_tasks_that_shuffle_give_the_same_rows(tmp_path):
    """Whatever was drawn before; lm_eval's own GPQA is such a task."""
    (tmp_path / "shuffled.py").write_text(SHUFFLED)
    write_task(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text(path.read_text().replace("{", "{process_docs: !function shuffled.process_docs, ", 1))
    # which would give what was drawn first
    datasets.disable_caching()
    try:
        drawn = []
        for _ in range(2):
            task: Any = load_tasks(["mine"], tmp_path).tasks[0]
            drawn.append([doc["question"] for doc in task.eval_docs])
    finally:
        datasets.enable_caching()
    assert drawn[0] == drawn[1]
    assert drawn[0] != [row["question"] for row in rows_of("arc")]


@pytest.mark.slow
def test_an_unknown_task_is_answered_with_the_nearest(evaluate):
    """lm_eval's own tasks are looked through, which takes seconds."""
    with pytest.raises(UserError, match=r"--tasks arc_chalenge is an unknown task; did you mean arc_challenge"):
        evaluate(tasks="arc_local,arc_chalenge")
    group = {"group": "mine", "task": ["arc_local", "arc_esy", {"task": "arc_challenge", "num_fewshot": 1}]}
    (evaluate.folder / "mine.yaml").write_text(json.dumps(group))
    with pytest.raises(UserError, match=r"mine\.yaml: task has the unknown arc_esy; did you mean arc_easy"):
        evaluate(tasks="mine")
    # lm_eval's own are found, but not their data
    (evaluate.folder / "mine.yaml").write_text(json.dumps(group | {"task": ["arc_local", "arc_easy"]}))
    with pytest.raises(UserError, match=r"arc_easy\.yaml: dataset_path names allenai/ai2_arc, which cannot be loaded"):
        evaluate(tasks="mine")


KILLED = """
import os, signal, sys
from minorca.evaluate import __main__ as command, result_cache, scoring
result_cache.PERIOD = 0
stream = scoring.Scorer.stream

def stream_until_killed(self, requests):
    for done, scored in enumerate(stream(self, requests)):
        if done == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        yield scored

scoring.Scorer.stream = stream_until_killed
command.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_run_goes_on(evaluate, monkeypatch):
    options = ["--model", evaluate.model, "--include-path", evaluate.folder, "--tasks", "local_tasks"]
    options += ["--dtype", "float32", "--cache", evaluate.path / "killed"]
    run = [sys.executable, "-c", KILLED, *map(str, options)]
    assert subprocess.run(run, env=ENVIRONMENT, capture_output=True, timeout=300, check=False).returncode == -9
    _, whole = evaluate(tasks="local_tasks")
    assert whole["results"]["lambada_local"]["perplexity_stderr,none"] > 0
    scored = []
    stream = Scorer.stream
    monkeypatch.setattr(Scorer, "stream", lambda self, requests: scored.append(len(requests)) or stream(self, requests))
    _, resumed = evaluate("--cache", evaluate.path / "killed", tasks="local_tasks")
    assert resumed["results"] == whole["results"]
    assert 0 < sum(scored) <= whole["minorca"]["requests"] - 20
    assert resumed["minorca"]["tokens_computed"] < whole["minorca"]["tokens_computed"]


@pytest.mark.slow
def test_two_ranks_give_one_ranks_results(evaluate):
    """To the bit, generations too; a second run computes nothing on either rank."""
    _, one = evaluate("--log-samples", tasks="local_tasks")
    output = evaluate.path / "two.json"
    options = ["--model", evaluate.model, "--include-path", evaluate.folder, "--tasks", "local_tasks", "--log-samples"]
    options += ["--dtype", "float32", "--cache", evaluate.path / "two", "--output", output]
    for computes in (True, False):
        evaluate_on_two_ranks(options)
        two = json.loads(output.read_text())
        assert two["results"] == one["results"] and two["samples"] == one["samples"]
        assert (two["minorca"]["tokens_computed"] > 0) == computes
