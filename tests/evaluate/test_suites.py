"""Suites: the cards' averages, tasks from local data, and what is said where data is missing."""

import dataclasses
import functools
import json
import math
import random
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
import transformers

pytest.importorskip("lm_eval")
import lm_eval
from lm_eval.api.metrics import aggregate_subtask_metrics, unweighted_mean_stderr
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from minorca import load_model, load_tokenizer
from minorca.errors import UserError
from minorca.evaluate import bigbench, suites, task_data
from minorca.evaluate.harness import MinorcaLM
from minorca.evaluate.published import PUBLISHED
from minorca.evaluate.task_data import task_configs
from tests.evaluate.harness_oracle import give_bos, hugging_face
from tests.evaluate.suite_files import MORE_ROWS, ROWS, write_rows
from tests.helpers import random_mistral

DIRECTORIES = set(bigbench.TASKS.values())


class Recorded(LM):
    """Answers with a function of (context, continuation); text is bytes."""

    def __init__(self, logp):
        super().__init__()
        self.logp = logp

    def loglikelihood(self, requests, disable_tqdm=False):
        return [(self.logp(*request.args), False) for request in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError

    def generate_until(self, requests, disable_tqdm=False):
        return ["It is 5. #### 5" for _ in requests]


def digest(context: str, continuation: str) -> float:
    """An arbitrary log-probability."""
    return -random.Random(f"{context}|{continuation}").random() * 30


def evaluate(lm: LM, tasks: list, **options) -> dict:
    # whose decorator hides its arguments from type checkers
    simple_evaluate: Any = lm_eval.simple_evaluate
    return simple_evaluate(
        lm, tasks=tasks, task_manager=TaskManager(include_defaults=False), bootstrap_iters=0, **options
    )


def evaluated(values: dict[str, tuple[str, float, float]], rows: int = 100) -> dict:
    """Results as lm_eval gives them, of (metric, value, standard error) by task."""
    results = {}
    for task, (metric, value, stderr) in values.items():
        name, filter = metric.split(",")
        results[task] = {metric: value, f"{name}_stderr,{filter}": stderr}
    return {"results": results, "n-samples": {task: {"original": rows, "effective": rows} for task in values}}


def score(name: str, values: Mapping[str, float | list[float]], stderr: float = 0.01) -> suites.SuiteResult:
    """A suite's scores, where each member's tasks have these values (in percent)."""
    names, results = {}, {}
    for member in suites.SUITES[name].members:
        value = values[member.name]
        of_tasks = value if isinstance(value, list) else [value]
        names[member.name] = [f"{member.name}{i}" for i in range(len(of_tasks))]
        results |= {f"{member.name}{i}": (member.metric, v / 100, stderr) for i, v in enumerate(of_tasks)}
    return suites.score(name, names, evaluated(results))


# ------------------------------------------------------------------------------------------------------------- averages


def test_the_averages_are_the_cards():
    """From the published scores of single tasks follow the published averages."""
    for name, column, tolerance in (
        ("leaderboard-v1", "OpenOrca, card", 0.005),
        ("leaderboard-v1", "OpenOrca, later", 0.005),
        ("leaderboard-v1", "Mistral-7B-v0.1", 0.005),
        ("agieval", "OpenOrca, later", 0.005),
        ("gpt4all", "OpenOrca, later", 0.005),
    ):
        published = {row: found.value for (of, row), found in PUBLISHED[name].items() if of == column}
        # the first card has no Winogrande and GSM8K
        values = {member.name: published.get(member.name, math.nan) for member in suites.SUITES[name].members}
        result = score(name, values)
        known = [average for average in result.averages if average.name in published]
        assert known
        for average in known:
            assert average.value == pytest.approx(published[average.name], abs=tolerance), (name, column)


def test_means_by_hand_and_as_lm_eval_averages_groups():
    values, errors = [0.5, 0.25, 0.9], [0.03, 0.04, 0.12]
    result = score("agieval", dict.fromkeys(suites.AGIEVAL, 50.0), stderr=0.02)
    # eight tasks: sqrt(8 * 2^2) / 8
    assert result.averages[0].stderr == pytest.approx(math.sqrt(8 * 4) / 8)
    scores = [suites.Score("", 100 * v, 100 * e, "", 10, 10) for v, e in zip(values, errors)]
    mean = suites.mean("mean", scores, "")
    assert mean.value == pytest.approx(55.0)
    # sqrt(3^2 + 4^2 + 12^2) = 13
    assert mean.stderr == pytest.approx(13 / 3)
    assert mean.value == pytest.approx(100 * aggregate_subtask_metrics(values, [1, 2, 3], weight_by_size=False))
    assert mean.stderr == pytest.approx(100 * unweighted_mean_stderr(errors))
    assert mean.rows == 30


def test_mmlu_is_the_mean_of_its_subjects_and_one_of_four():
    values = {"ARC": 60.0, "HellaSwag": 80.0, "MMLU": [10.0, 20.0, 60.0], "TruthfulQA": 50.0}
    result = score("leaderboard-v1", values | {"Winogrande": 70.0, "GSM8K": 20.0})
    assert [average.value for average in result.averages] == pytest.approx([55.0, 51.6666667])
    mmlu = result.members[2]
    assert (mmlu.value, mmlu.rows) == (pytest.approx(30.0), 300)
    # three tasks of one percent each, then four members, one of them smaller
    assert mmlu.stderr == pytest.approx(math.sqrt(3) / 3)
    assert result.averages[0].stderr == pytest.approx(math.sqrt(3 + 1 / 3) / 4)


def test_an_unknown_standard_error_makes_that_of_the_mean_unknown():
    results = evaluated(dict.fromkeys(suites.AGIEVAL, ("acc_norm,none", 0.5, 0.1)))
    # what lm_eval writes for a single row
    results["results"]["sat-en"]["acc_norm_stderr,none"] = "N/A"
    result = suites.score("agieval", {name: [name] for name in suites.AGIEVAL}, results)
    assert result.averages[0].value == pytest.approx(50.0)
    assert result.averages[0].stderr is None
    assert [member.stderr is None for member in result.members] == [name == "sat-en" for name in suites.AGIEVAL]


# ----------------------------------------------------------------------------------------------------------- local data


def test_shots_come_from_the_training_split(tmp_path):
    rows = {path: row for path, row in ROWS.items() if "winogrande" in path}
    rows |= {path.replace("validation", "train"): row for path, row in rows.items()}
    write_rows(tmp_path, rows, count=8)
    contexts = []
    (spec,) = suites.SUITES["leaderboard-v1"].members[4].configure(tmp_path)
    results = evaluate(Recorded(lambda *texts: contexts.append(texts[0]) or digest(*texts)), [spec])
    assert results["n-shot"] == {"winogrande": 5}
    assert all(context.count("thanked Eve because") == 6 for context in contexts)


def test_the_other_suites_tasks_from_local_files(tmp_path):
    write_rows(tmp_path, MORE_ROWS)
    members = {member.name: member for suite in suites.SUITES.values() for member in suite.members}
    configs = [config for name in ("TruthfulQA", "GSM8K", "sat-math") for config in members[name].configure(tmp_path)]
    configs += task_configs("mmlu/default/mmlu_anatomy.yaml", members["MMLU"].shots, tmp_path)
    contexts = {}

    def logp(context, continuation):
        contexts[continuation] = context
        return digest(context, continuation)

    results = evaluate(Recorded(logp), configs)
    scores = results["results"]
    # the probability of the two true answers among three
    assert 0 < scores["truthfulqa_mc2"]["acc,none"] < 1
    assert scores["gsm8k"]["exact_match,strict-match"] == 1
    assert {"acc_norm,none", "acc,none"} < scores["agieval_sat_math"].keys()
    assert results["n-shot"] == {"truthfulqa_mc2": 0, "gsm8k": 5, "agieval_sat_math": 0, "mmlu_anatomy": 5}
    # the first five of dev, after the subject's line
    assert contexts[" D"].startswith("The following are multiple choice questions (with answers) about anatomy.\n\n")
    assert [contexts[" D"].count(f"Which bone? {i}\n") for i in range(6)] == [1, 1, 1, 1, 1, 0]


def test_missing_data_says_what_to_download_and_where(tmp_path):
    with pytest.raises(UserError) as caught:
        suites.prepare("leaderboard-v1", tmp_path)
    messages = [str(problem) for problem in caught.value.problems]
    assert len(messages) == 6
    directory = tmp_path / "allenai" / "ai2_arc"
    assert (
        f"hf download allenai/ai2_arc --repo-type dataset --include 'ARC-Challenge/*' --local-dir {directory}"
        in (messages[0])
    )
    assert "train.jsonl" in messages[0]
    # all subjects of MMLU in one
    assert f"hf download cais/mmlu --repo-type dataset --local-dir {tmp_path / 'cais' / 'mmlu'};" in messages[2]
    with pytest.raises(UserError, match="pip download .* bigbench==1.0.0") as caught:
        suites.prepare("bigbench-hard", tmp_path)
    assert len(caught.value.problems) == 1


def test_all_57_subjects_of_mmlu_are_found_in_one_directory(tmp_path):
    root = Path(sys.modules["lm_eval"].__file__ or "").parent / "tasks" / "mmlu" / "default"
    for file in root.glob("mmlu_*.yaml"):
        write_rows(tmp_path, {f"cais/mmlu/{file.stem[5:]}/{split}": {"question": "q"} for split in ("dev", "test")}, 1)
    configs = task_configs("mmlu/default/mmlu_*.yaml", 5, tmp_path)
    assert len(configs) == len({config["task"] for config in configs}) == 57
    assert all(config["dataset_path"] == "json" and config["num_fewshot"] == 5 for config in configs)


def test_wrong_local_files_name_file_and_field(tmp_path):
    rows = dict(ROWS)
    rows["baber/piqa/plain_text/validation"] = {"goal": "Open a door", "sol1": "push", "label": 0}
    write_rows(tmp_path, rows)
    broken = tmp_path / "allenai" / "openbookqa" / "main" / "test-00000-of-00001.jsonl"
    broken.write_text('{"question_stem": ')
    with pytest.raises(UserError) as caught:
        suites.prepare("gpt4all", tmp_path)
    file = tmp_path / "baber" / "piqa" / "plain_text" / "validation-00000-of-00001.jsonl"
    messages = [str(problem) for problem in caught.value.problems]
    assert len(messages) == 2
    assert messages[0] == f"{broken}, line 1: not valid JSON (Expecting value, column 19)"
    assert messages[1].startswith(f"{file}: doc_to_choice names the column sol2, which the data lack")


TRUTHFUL = "truthfulqa/truthful_qa/multiple_choice/validation"


@pytest.mark.parametrize(
    "path, change, message",
    [
        (
            "allenai/openbookqa/main/test",
            {"answerKey": "E"},
            "row 1: doc_to_target .*'E' is not in list",
        ),
        ("allenai/winogrande/winogrande_xl/validation", {"answer": None}, "winogrande_xl: lacks the column 'answer'"),
        ("Rowan/hellaswag/data/validation", {"ctx_a": None}, "data: lacks the column 'ctx_a', which hellaswag needs"),
        (TRUTHFUL, {"mc2_targets": {"choices": ["a", "b"]}}, "row 1: process_results cannot be made .*'labels'"),
    ],
)
def test_rows_that_a_suite_cannot_use_are_named(path, change, message, tmp_path, monkeypatch):
    """A column that is None here is missing."""
    row = {key: value for key, value in ((ROWS | MORE_ROWS)[path] | change).items() if value is not None}
    write_rows(tmp_path, {path: row})
    member = next(m for suite in suites.SUITES.values() for m in suite.members if path in str(paths_of(m, tmp_path)))
    monkeypatch.setattr(suites, "SUITES", {"one": suites.Suite("One", (member,), {})})
    with pytest.raises(UserError, match=message):
        suites.prepare("one", tmp_path)


def paths_of(member: suites.Member, data: Path) -> list:
    try:
        return [task_data.data_files(config) for config in member.configure(data)]
    except UserError:
        return []


def test_a_split_is_whole_and_there_once(tmp_path):
    rows = {path: row for path, row in ROWS.items() if "piqa" in path}
    ((path, _),) = rows.items()
    write_rows(tmp_path, rows)
    first = tmp_path / f"{path}-00000-of-00001.jsonl"
    first.rename(first.with_name("validation-00000-of-00002.jsonl"))
    with pytest.raises(UserError, match="piqa: has 1 of the 2 files of validation; download the others"):
        task_configs("piqa/piqa.yaml", 0, tmp_path)
    write_rows(tmp_path, rows)
    with pytest.raises(UserError, match="piqa: has validation more than once: .*of-00001.jsonl, .*of-00002.jsonl;"):
        task_configs("piqa/piqa.yaml", 0, tmp_path)


def test_seed_is_all_five(monkeypatch, tmp_path):
    """Each suite is evaluated by itself, since two of them have the same task with other shots."""
    calls = []
    for name, suite in suites.SUITES.items():
        members = tuple(dataclasses.replace(m, configure=lambda _, m=m: [{"task": m.name}]) for m in suite.members)
        monkeypatch.setitem(suites.SUITES, name, dataclasses.replace(suite, members=members))
    monkeypatch.setattr(suites, "_load", lambda config, *_: SimpleNamespace(task_name=config["task"]))
    metrics = {m.name: m.metric for suite in suites.SUITES.values() for m in suite.members}

    def evaluate_tasks(loaded):
        calls.append(len(loaded["tasks"]))
        return evaluated({name: (metrics[name], 0.25, 0.01) for name in loaded["tasks"]})

    prepared = suites.prepare("seed", tmp_path)
    results = suites.run(prepared, evaluate_tasks)
    assert [*(result.suite for result in results), "mt-bench", "seed"] == list(suites.NAMES)
    assert calls == [6, 8, 18, 7]
    assert suites.prepare("mt-bench", tmp_path) == {}
    assert [name for name in suites.NAMES if suites.has_mt_bench(name)] == ["mt-bench", "seed"]


# ------------------------------------------------------------------------------------------------------------- bigbench


def write_task(data: Path, name: str, task: dict) -> Path:
    file = data / "benchmark_tasks" / bigbench.TASKS[name] / "task.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(task))
    return file


def example(number: int, **fields) -> dict:
    scores = {"yes": 0, "no": 1, "perhaps": 0}
    return {"input": f"Is {number} even?", "target_scores": scores} | fields


def test_a_row_is_rendered_as_big_bench_does(tmp_path):
    examples = [example(1), example(2), example(1)]
    rows = bigbench.read_rows(write_task(tmp_path, "snarks", {"examples": examples}))
    # equal rows count once; the order of numpy.random.RandomState(42).permutation(3) is 0, 1, 2
    text = "\nQ: Is 1 even?\n  choice: no\n  choice: perhaps\n  choice: yes\nA: "
    assert rows[0] == {"query": text, "choices": ["yes", "no", "perhaps"], "scores": [0, 1, 0], "gold": 1}
    assert len(rows) == 2
    task = {
        "task_prefix": "Answer.\n",
        "example_input_prefix": "<",
        "example_output_prefix": ">",
        "append_choices_to_input": False,
        "examples": examples[:1],
    }
    (row,) = bigbench.read_rows(write_task(tmp_path, "navigate", task))
    assert row["query"] == "Answer.\n<Is 1 even?>"


def test_wrong_schemas_name_file_row_and_field(tmp_path):
    examples = [example(1), example(2, input=3), example(3, target_scores={"yes": "1"}), "text"]
    file = write_task(tmp_path, "snarks", {"examples": examples})
    with pytest.raises(UserError) as caught:
        bigbench.read_rows(file)
    assert [(p.path, p.where, p.field) for p in caught.value.problems] == [
        (file, "examples[1]", "input"),
        (file, "examples[2]", "target_scores"),
        (file, "examples[3]", None),
    ]
    keys = {"task_prefix": 3, "append_choices_to_input": "no", "examples": [example(1)]}
    file = write_task(tmp_path, "sports_understanding", keys)
    with pytest.raises(UserError) as caught:
        bigbench.read_rows(file)
    assert [str(problem) for problem in caught.value.problems] == [
        f"{file}: task_prefix is 3; expected text",
        f"{file}: append_choices_to_input is 'no'; expected true or false",
    ]
    with pytest.raises(UserError, match="examples"):
        bigbench.read_rows(write_task(tmp_path, "navigate", {"examples": []}))
    with pytest.raises(UserError, match="ruin_names/task.json: no such file"):
        bigbench.task_config("ruin_names", tmp_path)


def render(task: dict, row: dict) -> str:
    """BIG-bench's rendering with zero shots, by its own description of the keys' meaning and defaults."""
    text = task.get("example_input_prefix", "\nQ: ") + row["input"]
    if task.get("append_choices_to_input", True):
        prefix = task.get("choice_prefix", "\n  choice: ")
        order = numpy.random.RandomState(seed=42).permutation(sorted(row["target_scores"]))
        text += prefix + prefix.join(order)
    return task.get("task_prefix", "") + text + task.get("example_output_prefix", "\nA: ")


def random_lm() -> Callable[[str, str], float]:
    """The log-probability of bytes after bytes, by a model with random weights."""
    model = random_mistral(vocab_size=256, num_hidden_layers=1, max_position_embeddings=4096)

    @functools.cache
    @torch.inference_mode()
    def logp(context: str, continuation: str) -> float:
        before, after = context.encode(), continuation.encode()
        logits = model(torch.tensor([[*before, *after]])).logits[0].log_softmax(-1)
        return sum(logits[len(before) + i - 1, byte].item() for i, byte in enumerate(after))

    return logp


def direct_score(task: dict, logp, limit: int) -> float:
    """The mean score of the likeliest choices of the first rows, without lm_eval."""
    rows = list({json.dumps(row): row for row in task["examples"]}.values())[:limit]
    scores = []
    for row in rows:
        logps = {choice: logp(render(task, row), choice) for choice in row["target_scores"]}
        scores.append(row["target_scores"][max(logps, key=lambda choice: logps[choice])])
    return sum(scores) / len(scores)


def test_lm_eval_gives_the_accuracy_of_a_direct_computation(tmp_path):
    rng = random.Random(0)
    tasks = {}
    for name, options in {"snarks": {}, "navigate": {"append_choices_to_input": False, "task_prefix": "If"}}.items():
        rows = [
            example(i, target_scores={choice: rng.choice((0, 1)) for choice in ("a1", "b2", "c3", "d4")})
            for i in range(6)
        ]
        tasks[name] = options | {"examples": rows}
        write_task(tmp_path, name, tasks[name])
    logp = random_lm()
    specs = [bigbench.task_config(name, tmp_path) for name in tasks]
    results = evaluate(Recorded(logp), specs)
    values = [results["results"][f"bigbench_{name}"]["multiple_choice_grade,none"] for name in tasks]
    assert values == pytest.approx([direct_score(task, logp, 6) for task in tasks.values()])
    assert len(set(values)) > 1


# Rows of the files, and those that are left where equal ones count once.
COUNTS = {
    "causal_judgement": (190, 190),
    "date_understanding": (369, 369),
    "disambiguation_qa": (258, 258),
    "geometric_shapes": (360, 359),
    "logical_deduction_five_objects": (500, 500),
    "logical_deduction_seven_objects": (700, 700),
    "logical_deduction_three_objects": (300, 300),
    "movie_recommendation": (500, 500),
    "navigate": (1000, 1000),
    "reasoning_about_colored_objects": (2000, 2000),
    "ruin_names": (448, 448),
    "salient_translation_error_detection": (998, 998),
    "snarks": (181, 181),
    "sports_understanding": (1000, 986),
    "temporal_sequences": (1000, 1000),
    "tracking_shuffled_objects_five_objects": (1250, 1250),
    "tracking_shuffled_objects_seven_objects": (1750, 1750),
    "tracking_shuffled_objects_three_objects": (750, 750),
}


@pytest.fixture(scope="session")
def big_bench(tmp_path_factory) -> Path:
    """The 18 task.json of the sdist, in a directory as the user unpacks it. They are not part of this repository."""
    directory = tmp_path_factory.mktemp("bigbench")
    options = ["--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", str(directory)]
    command = [sys.executable, "-m", "pip", "download", *options, "bigbench==1.0.0"]
    downloaded = subprocess.run(command, capture_output=True, text=True)
    if downloaded.returncode:
        pytest.skip(f"the sdist of bigbench cannot be downloaded: {downloaded.stderr[-300:]}")
    archive = directory / "bigbench-1.0.0.tar.gz"
    with tarfile.open(archive) as tar:
        wanted = [m for m in tar if m.name.endswith("task.json") and m.name.partition("tasks/")[2][:-10] in DIRECTORIES]
        tar.extractall(directory, wanted, filter="data")
    archive.unlink()
    return directory


@pytest.mark.slow
def test_the_18_tasks_of_the_sdist(big_bench):
    """Rows, gold answers, and the accuracy of a random model on the first five rows of each."""
    specs = {name: bigbench.task_config(name, big_bench) for name in bigbench.TASKS}
    logp = random_lm()
    limit = 5
    results = evaluate(Recorded(logp), list(specs.values()), limit=limit)
    for name, directory in bigbench.TASKS.items():
        file = big_bench / "bigbench-1.0.0" / "bigbench" / "benchmark_tasks" / directory / "task.json"
        task = json.loads(file.read_text())
        rows = bigbench.read_rows(file)
        assert (len(task["examples"]), len(rows)) == COUNTS[name]
        for row in rows:
            assert max(row["scores"]) == 1
            assert row["scores"][row["gold"]] == 1
            assert len(row["choices"]) == len(row["scores"]) > 1
            assert "".join(row["choices"])
        task_name = f"bigbench_{name}"
        assert results["n-samples"][task_name] == {"original": len(rows), "effective": limit}
        value = results["results"][task_name]["multiple_choice_grade,none"]
        assert value == pytest.approx(direct_score(task, logp, limit)), name


@pytest.mark.slow
@pytest.mark.parametrize("shots, add_bos, limit", [(0, None, 2), (1, True, 1)], ids=["zero-shot", "an example and BOS"])
def test_smollm2_on_real_tasks_as_lm_evals_class(shots, add_bos, limit, big_bench, smollm2):
    """The first rows of the 12 tasks with the shortest ones: the log-likelihoods of lm_eval's `hf` in fp64, and its
    scores. In fp32 its own are 1e-4 off. SmolLM2's tokenizer adds no BOS by itself.
    """
    tasks = [bigbench.task_config(name, big_bench) for name in bigbench.TASKS]
    rows = {config["task"]: config["custom_dataset"]()["test"][0] for config in tasks}
    tasks.sort(key=lambda config: len(rows[config["task"]]["query"]) * len(rows[config["task"]]["choices"]))
    tasks = [config | {"num_fewshot": shots, "fewshot_split": "test"} for config in tasks[:12]]
    ours = MinorcaLM(load_model(smollm2, torch.float32, "cpu"), load_tokenizer(smollm2), add_bos=add_bos)
    exact = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float64)
    theirs = hugging_face(smollm2, exact)
    if add_bos:
        give_bos(theirs)
    found, expected = (evaluate(lm, tasks, limit=limit) for lm in (ours, theirs))
    assert len(expected["samples"]) == 12 and ours.begins_with_bos is bool(add_bos)
    for task, samples in expected["samples"].items():
        assert len(samples) == limit
        for mine, sample in zip(found["samples"][task], samples, strict=True):
            logps = [logp for ((logp, _),) in sample["resps"]]
            assert [logp for ((logp, _),) in mine["resps"]] == pytest.approx(logps, rel=0, abs=1e-4), task
            assert mine[bigbench.METRIC] == sample[bigbench.METRIC]
