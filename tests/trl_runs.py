"""Runs of TRL's trainers, in fp32 on the CPU: what runs of preferences are compared with."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import MistralForCausalLM, PreTrainedTokenizerFast
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

KINDS: dict[str, tuple[Any, Any]] = {
    "dpo": (DPOTrainer, DPOConfig),
    "cpo": (CPOTrainer, CPOConfig),
    "orpo": (ORPOTrainer, ORPOConfig),
    "kto": (KTOTrainer, KTOConfig),
}
# a row that each trainer prepares and that no step has: the steps' ids are given
UNUSED = {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}
UNUSED_LABELLED = {"prompt": ["a"] * 2, "completion": ["b"] * 2, "label": [True, False]}


def tokenizer_of(directory: Path) -> PreTrainedTokenizerFast:
    """A model's tokenizer, as transformers has it."""
    end = "<|im_end|>"
    return PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), eos_token=end, pad_token=end)


def labelled_ids(prompt: list[int], answer: list[int], name: str) -> dict[str, list[int]]:
    """An answer with its prompt as CPO's and ORPO's collator takes it."""
    ids, labels = prompt + answer, [-100] * len(prompt) + answer
    return {f"{name}_input_ids": ids, f"{name}_attention_mask": [1] * len(ids), f"{name}_labels": labels}


def trl_run(
    kind: str,
    steps: list[list[dict]],
    model_path: Path,
    adapter: Path,
    output: Path,
    reference: Path | None = None,
    prompt_in_nll: bool = False,
    **settings,
) -> list[dict]:
    """What TRL logs for each step.

    Args:
        kind: of `KINDS`.
        steps: the rows of each step, one batch: `prompt_ids` and `chosen_ids`, `rejected_ids` of a pair, or
            `completion_ids`, `KL_completion_ids` and `label` of KTO's.
        adapter: the directory of the adapter that is trained; TRL keeps a copy of it as the reference.
        reference: the directory of another reference.
        prompt_in_nll: ORPO's negative log-likelihood is an average over prompts and chosen answers, as TRL has it, not
            over the answers alone.
        settings: of TRL's configuration, its loss among them.
    """
    trainer_class, config_class = KINDS[kind]
    rows = [row for step in steps for row in step]
    if kind in ("cpo", "orpo"):
        rows = [
            {f"prompt_{key}": [] for key in ("input_ids", "attention_mask")}
            | labelled_ids(row["prompt_ids"], row["chosen_ids"], "chosen")
            | labelled_ids(row["prompt_ids"], row["rejected_ids"], "rejected")
            for row in rows
        ]
    numbers = iter(range(len(rows)))
    batches = [[next(numbers) for _ in step] for step in steps]

    class Trainer(trainer_class):
        def get_train_dataloader(self) -> DataLoader:
            return DataLoader(rows, batch_sampler=batches, collate_fn=self.data_collator)  # pyright: ignore

        def concatenated_forward(self, model, batch) -> tuple:
            *outputs, nll = super().concatenated_forward(model, batch)
            if kind == "orpo" and not prompt_in_nll:
                labels = batch["chosen_labels"][:, 1:]
                # chosen answers are padded to the length of the longest of both
                logits = outputs[2][:, : labels.shape[1]]
                nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
            return *outputs, nll

    config = {
        "output_dir": str(output),
        "max_steps": len(steps),
        "per_device_train_batch_size": 2,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "max_length": None,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    load = partial(MistralForCausalLM.from_pretrained, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(load(model_path), adapter, is_trainable=True)
    trainer = Trainer(
        model=model,
        args=config_class(**config | settings),
        train_dataset=Dataset.from_dict(UNUSED_LABELLED if kind == "kto" else UNUSED),
        processing_class=tokenizer_of(model_path),
        **({"ref_model": load(reference)} if reference else {}),
    )
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]
