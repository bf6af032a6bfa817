"""Whole runs of preferences against TRL's trainers: the same pairs in the same steps, from the same adapter, in fp32.

TRL is given our ids, but where a test is about its own.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import MistralForCausalLM, PreTrainedTokenizerFast
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from minorca.cli import config_parser, parse_config
from minorca.data.store import TokenStore
from minorca.train import __main__ as train_command
from minorca.train import inputs
from tests.helpers import Workplace, lines_of, random_adapter, random_mistral, save_tokenizer
from tests.trl_runs import tokenizer_of, trl_run

TARGETS = ["q", "k", "v", "o", "gate", "up", "down"]
LOGPS = ("logps/chosen", "logps/rejected")
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
LR = 5e-4
# of a pair, as TRL takes it
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
# Mistral-7B-OpenOrca's
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SHAPE = {"vocab_size": 260, "num_hidden_layers": 3, "sliding_window": 24, "initializer_range": 0.05}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Workplace:
    """A random model of three layers with a window shorter than the rows, an adapter, pairs of unequal lengths, and
    labelled answers and scored ones to the same prompts.
    """
    path: Path = tmp_path_factory.mktemp("trl")
    model = random_mistral(**SHAPE)
    model.save_pretrained(path / "model")
    save_tokenizer(path / "model")
    random_adapter(random_mistral(**SHAPE), path / "adapter", TARGETS)
    draw = random.Random(0)
    pairs, labelled, scored = [], [], []
    for _ in range(64):
        word, other = ("".join(draw.choices("abcdef", k=draw.randint(1, 12))) for _ in range(2))
        prompt = f"Reverse {word}"
        pairs.append({"prompt": prompt, "chosen": word[::-1], "rejected": other})
        labelled.append(
            {"prompt": prompt, "completion": draw.choice([word[::-1], other]), "label": bool(len(word) % 2)}
        )
        answers = [{"text": text, "score": score} for score, text in enumerate([f"{other}?", "No.", word[::-1]])]
        scored.append({"prompt": prompt, "completions": answers})
    for name, rows in (("rows", pairs), ("labelled", labelled), ("scored", scored)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Workplace(path, path / "model", model)


@dataclass
class Ours:
    """A run of ours.

    Attributes:
        lines: of its steps.
        steps: the rows of each step.
    """

    lines: list[dict]
    store: TokenStore
    steps: list[np.ndarray]

    def pairs(self) -> list[list[dict]]:
        """The pairs of each step, as TRL takes them."""
        return [[pair for row in rows for pair in pairs_of(self.store, row)] for rows in self.steps]

    def labelled(self) -> list[list[dict]]:
        """The labelled answers of each step, as TRL takes them: each with the one before it for the distance from the
        reference.
        """
        steps = []
        for rows in self.steps:
            answers = [answers_of(self.store, row) for row in rows]
            steps.append(
                [
                    {"prompt_ids": prompt, "completion_ids": own, "KL_completion_ids": other, "label": bool(scores[0])}
                    for (prompt, [own], scores), (_, [other], _) in zip(answers, [answers[-1], *answers[:-1]])
                ]
            )
        return steps


def answers_of(store: TokenStore, row: int) -> tuple[list[int], list[list[int]], np.ndarray]:
    """A row's prompt, its answers and their scores; all tokens of an answer are scored, none of the prompt."""
    ids, trained = store.row(row)
    starts, scores = store.branches(row)
    assert trained[starts[0] :].all() and not trained[: starts[0]].any()
    prompt, *answers = (part.tolist() for part in np.split(ids, starts))
    return prompt, answers, scores


def pairs_of(store: TokenStore, row: int) -> list[dict]:
    prompt, answers, scores = answers_of(store, row)
    return [
        {"prompt_ids": prompt, "chosen_ids": answers[i], "rejected_ids": answers[j]}
        for i in range(len(answers))
        for j in range(len(answers))
        if scores[i] > scores[j]
    ]


def run_ours(place: Workplace, objective: str, settings: dict[str, Any] | None = None, steps: int = 5) -> Ours:
    """Steps of several micro-batches, each of several packed trees."""
    defaults = {
        "train.objective": objective,
        "train.steps": steps,
        "data.format": "preference",
        "lora.init": place.path / "adapter",
        "lora.alpha": 8,
        "lora.targets": json.dumps(TARGETS),
        "optim.lr": LR,
        "optim.schedule": "constant",
        "train.batch_tokens": 384,
    }
    options = place(f"run-{len(list(place.path.iterdir()))}", **defaults | (settings or {}))
    train_command.main(options)
    _, config = parse_config(config_parser("test", ""), options)
    data = inputs.read_inputs(config)
    schedule = data.schedule(config)
    lines = [line for line in lines_of(config.output) if "loss" in line]
    return Ours(lines, data.store, [np.concatenate(schedule.step(n)) for n in range(1, steps + 1)])


def run_theirs(place: Workplace, kind: str, steps: list[list[dict]], **settings: Any) -> list[dict]:
    paths = place.model_path, place.path / "adapter", place.path / "theirs"
    return trl_run(kind, steps, *paths, learning_rate=LR, **settings)


def assert_equal(ours: list[dict], theirs: list[dict], names: tuple[str, ...]) -> None:
    """In every step, within 1e-4."""
    assert len(ours) == len(theirs)
    for name in names:
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], abs=1e-4, rel=0), name


def test_dpo_of_twenty_steps(place):
    """The reference is a copy of the adapter that training starts from."""
    ours = run_ours(place, "dpo", steps=20)
    assert_equal(ours.lines, run_theirs(place, "dpo", ours.pairs()), ("loss", *LOGPS, *REWARDS, "entropy", "grad_norm"))
    assert ours.lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-6) and ours.lines[0]["rewards/margins"] == 0
    assert min(map(len, ours.steps)) > 1


@pytest.mark.slow
def test_dpo_with_the_base_as_reference(place):
    ours = run_ours(place, "dpo", {"dpo.reference": "base"})
    theirs = run_theirs(place, "dpo", ours.pairs(), reference=place.model_path)
    assert_equal(ours.lines, theirs, ("loss", *LOGPS, *REWARDS))
    assert ours.lines[0]["loss"] != pytest.approx(np.log(2), abs=1e-3)


@pytest.mark.parametrize(
    "loss, smoothing",
    [
        ("ipo", 0),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("hinge", 0), ("robust", 0.2), ("exo", 1e-3), ("apo_zero", 0), ("apo_down", 0))
        ),
    ],
)
def test_losses_of_dpo(loss, smoothing, place):
    ours = run_ours(place, "dpo", {"dpo.loss": loss, "dpo.label_smoothing": smoothing})
    name = "exo_pair" if loss == "exo" else loss
    theirs = run_theirs(place, "dpo", ours.pairs(), loss_type=[name], label_smoothing=smoothing)
    assert_equal(ours.lines, theirs, ("loss", *LOGPS, *REWARDS))


def test_dpo_of_means_and_cross_entropy(place):
    """TRL's term `sft` is a mean over the tokens of a batch, ours over those of a step."""
    ours = run_ours(place, "dpo", {"dpo.loss": "sigmoid_norm", "dpo.sft_weight": 0.5, "dpo.beta": 2.0})
    settings = {"loss_type": ["sigmoid_norm", "sft"], "loss_weights": [1.0, 0.5], "beta": 2.0}
    theirs = run_theirs(place, "dpo", ours.pairs(), **settings)
    assert_equal(ours.lines, theirs, ("loss", *LOGPS, *REWARDS))


@pytest.mark.slow
def test_cpo(place):
    ours = run_ours(place, "cpo", {"dpo.label_smoothing": 0.1})
    theirs = run_theirs(place, "cpo", ours.pairs(), label_smoothing=0.1)
    assert_equal(ours.lines, theirs, ("loss", *LOGPS, *REWARDS))


def test_simpo(place):
    """TRL has SimPO as a loss of CPO, from which its cross-entropy must be taken out."""
    ours = run_ours(place, "simpo", {"dpo.beta": 2.0, "dpo.gamma": 1.0})
    settings = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0}
    assert_equal(ours.lines, run_theirs(place, "cpo", ours.pairs(), **settings), ("loss", *REWARDS))


def test_orpo(place):
    """With the negative log-likelihood averaged over chosen answers, as in the paper."""
    ours = run_ours(place, "orpo", {"dpo.beta": 0.5})
    assert_equal(ours.lines, run_theirs(place, "orpo", ours.pairs(), beta=0.5), ("loss", "grad_norm", *REWARDS))


def test_trl_averages_the_likelihood_of_orpo_over_prompts_too(place):
    """The other term of its loss is ours."""
    ours = run_ours(place, "orpo", steps=1)
    theirs = run_theirs(place, "orpo", ours.pairs(), prompt_in_nll=True)
    model = PeftModel.from_pretrained(random_mistral(**SHAPE), place.path / "adapter")
    losses_M, answers_M = [], []
    for pair in ours.pairs()[0]:
        ids = torch.tensor(pair["prompt_ids"] + pair["chosen_ids"])
        losses_M.append(F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none").detach())
        answers_M.append(torch.arange(1, len(ids)) >= len(pair["prompt_ids"]))
    losses, answers = torch.cat(losses_M), torch.cat(answers_M)
    assert theirs[0]["nll_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    odds_ratio = theirs[0]["loss"] - losses.mean().item()
    assert ours.lines[0]["loss"] == pytest.approx(losses[answers].mean().item() + odds_ratio, abs=1e-5)


def test_kto(place):
    """One batch of TRL is one step, by whose answers both estimate the distance from the reference."""
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.75}
    settings = {f"dpo.{name}": value for name, value in weights.items()}
    ours = run_ours(place, "kto", settings | {"data.train": place.path / "labelled.jsonl"})
    theirs = run_theirs(place, "kto", ours.labelled(), **weights)
    assert_equal(ours.lines, theirs, ("loss", "kl", *LOGPS, *(name for name in REWARDS if "accuracies" not in name)))
    assert any(line["kl"] > 0 for line in ours.lines)


@pytest.mark.slow
def test_all_pairs_of_three_answers(place):
    """TRL reads each prompt six times."""
    ours = run_ours(place, "dpo", {"data.train": place.path / "scored.jsonl", "data.pairs": "all"})
    assert all(len(pairs) == 3 * len(rows) for pairs, rows in zip(ours.pairs(), ours.steps))
    assert_equal(ours.lines, run_theirs(place, "dpo", ours.pairs()), ("loss", *LOGPS, *REWARDS))


def ids_of_trl(rows: list[dict], tokenizer: PreTrainedTokenizerFast) -> list[dict[str, list[int]]]:
    """Pairs as TRL itself tokenizes them."""
    args = DPOConfig("unused", max_length=None, bf16=False, use_cpu=True)
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
    prepared: Any = DPOTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, args, "train")
    return [{key: row[key] for key in IDS} for row in prepared]


def test_trl_scores_the_newline_after_an_answer(place, monkeypatch):
    """TRL's own ids of the rows: the same prompts and, but for ChatML's last newline, answers. A run on them, newline
    included, is TRL's run.
    """
    tokenizer = tokenizer_of(place.model_path)
    tokenizer.chat_template = CHATML
    rows = [json.loads(line) for line in (place.path / "rows.jsonl").read_text().splitlines()]
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    messages = [{key: [{"role": role, "content": row[key]}] for key, role in roles.items()} for row in rows]
    theirs = ids_of_trl(messages, tokenizer)

    ours = run_ours(place, "dpo", steps=2)
    newline: Any = tokenizer("\n")["input_ids"]
    for row, pair in enumerate(theirs):
        expected = pairs_of(ours.store, row)[0]
        assert pair == expected | {key: expected[key] + newline for key in IDS[1:]}

    store = store_of(theirs, ours.store)
    monkeypatch.setattr(inputs, "prepare_store", lambda *_: store)
    with_newline = run_ours(place, "dpo", steps=2)
    steps = [[theirs[row] for row in rows] for rows in with_newline.steps]
    assert_equal(with_newline.lines, run_theirs(place, "dpo", steps), ("loss", *LOGPS, *REWARDS))


def test_trl_trains_what_merges_across_the_end_of_a_prompt(smollm2, tmp_path):
    """TRL tokenizes a prompt together with its answers, and takes what all three begin with as the prompt; ours is
    tokenized by itself, as it will be when the model is asked.
    """
    row = {"prompt": "I am un", "chosen": "able", "rejected": "sure"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    options = [
        f"--model.path={smollm2}",
        f"--data.train={tmp_path / 'rows.jsonl'}",
        "--data.format=preference",
        "--data.template=none",
        "--train.objective=dpo",
    ]
    _, config = parse_config(config_parser("test", ""), options)
    tokenizer = tokenizer_of(smollm2)

    def texts(pair: dict[str, list[int]]) -> list:
        return [tokenizer.decode(pair[key]) for key in IDS]

    assert texts(ids_of_trl([row], tokenizer)[0]) == ["I am", " unable<|im_end|>", " unsure<|im_end|>"]
    assert texts(pairs_of(inputs.read_inputs(config).store, 0)[0]) == ["I am un", "able<|im_end|>", "sure<|im_end|>"]


def store_of(pairs: list[dict], like: TokenStore) -> TokenStore:
    """A store of the sources of another."""
    parts = [[pair[key] for key in IDS] for pair in pairs]
    lengths = np.array([[len(ids) for ids in row] for row in parts])
    return TokenStore(
        np.concatenate([ids for row in parts for ids in row]).astype(np.uint16),
        np.repeat(np.tile([False, True, True], len(pairs)), lengths.ravel()),
        np.append(0, lengths.sum(1).cumsum()),
        branch_offsets=np.arange(0, 2 * len(pairs) + 1, 2),
        branch_starts=lengths.cumsum(1)[:, :2].ravel().astype(np.int32),
        branch_scores=np.tile(np.array([1, 0], np.float32), len(pairs)),
        sources=like.sources,
    )


@pytest.mark.slow
def test_smollm2(smollm2, tmp_path):
    """Four steps of a real model from a fresh adapter."""
    rows = [
        {
            "system": "Be brief.",
            "question": f"How many minutes are in {hours} hours?",
            "chosen": f"One hour is 60 minutes, so {hours} x 60 = {60 * hours}. The answer is {60 * hours}.",
            "rejected": f"The answer is {hours}60.",
        }
        for hours in range(2, 14)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = MistralForCausalLM.from_pretrained(smollm2)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=[f"{target}_proj" for target in TARGETS])
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    place = Workplace(tmp_path, smollm2, model)
    ours = run_ours(place, "dpo", steps=4)
    theirs = run_theirs(place, "dpo", ours.pairs())
    assert_equal(ours.lines, theirs, ("loss", *LOGPS, *REWARDS))
    assert ours.lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-6) and ours.lines[-1]["loss"] < 0.6
