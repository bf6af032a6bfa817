"""Adapters that change the embedding and head, compared with PEFT on files that it wrote."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minorca import UserError, load_model
from minorca.export.__main__ import export
from minorca.files.vocabulary import check_shares_vocabulary
from minorca.model.build import load_adapters
from tests.helpers import relative_error, save_tokenizer

BOTH = ["embed_tokens", "lm_head"]
TOKENS = torch.randint(256, (40,), generator=torch.Generator().manual_seed(1))
TOKENS[3:9] = torch.tensor([258, 259, 258, 260, 261, 260])


def saved(directory: Path, resize: int | None, adapter: Path, **fields):
    """PEFT's model of a directory, with random numbers in all that is trained, saved to `adapter`."""
    base = AutoModelForCausalLM.from_pretrained(directory)
    if resize:
        base.resize_token_embeddings(resize, mean_resizing=False)
    # PEFT changes lists that it is given
    config = copy.deepcopy(fields)
    config = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | config
    model = get_peft_model(base, LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    model.save_pretrained(str(adapter))
    return model


def rows(*matrices: str) -> dict:
    return {"trainable_token_indices": {matrix: [258, 260, 261] for matrix in matrices}}


@pytest.mark.parametrize("resize", [None, 262])
@pytest.mark.parametrize(
    "tied, stays_tied, fields",
    [
        (False, False, rows(*BOTH)),
        (False, False, {"modules_to_save": BOTH}),
        (False, False, {"modules_to_save": ["lm_head"], **rows("embed_tokens")}),
        (False, False, {"target_modules": ["q_proj", *BOTH], "rank_pattern": {"lm_head": 2}}),
        (True, True, {"trainable_token_indices": [258, 260, 261]}),
        (True, True, rows(*BOTH)),
        (True, False, {"modules_to_save": ["lm_head"]}),
        (True, False, {"modules_to_save": BOTH}),
        (True, True, {"modules_to_save": BOTH, "ensure_weight_tying": True}),
        (True, False, {"target_modules": ["q_proj", *BOTH], "use_rslora": True}),
    ],
    ids=str,
)
def test_logits_are_pefts(tied, stays_tied, fields, resize, save_mistral, tmp_path):
    """With the adapter, and merged with it; resized or not, and tied as PEFT ties."""
    directory, _ = save_mistral(vocab_size=260 if resize else 262, tie_word_embeddings=tied)
    save_tokenizer(directory)
    theirs = saved(directory, resize, tmp_path / "adapter", **fields)
    with torch.no_grad():
        expected = theirs(TOKENS[None]).logits[0]
        model = load_model(directory, torch.float32, "cpu", adapter=tmp_path / "adapter")
        assert relative_error(model(TOKENS), expected) <= 1e-5
        export(directory, tmp_path / "adapter", tmp_path / "merged")
        for merged in (
            load_model(tmp_path / "merged", torch.float32, "cpu"),
            lambda tokens: AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(tokens[None]).logits[0],
        ):
            assert relative_error(merged(TOKENS), expected) <= 1e-5
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (262, stays_tied)


def test_another_base(save_mistral, tmp_path):
    """A base with fewer or more ids than that of training; rows that are missing; what the settings promise."""
    directory, _ = save_mistral(vocab_size=260)
    larger, _ = save_mistral(vocab_size=300)
    smaller, _ = save_mistral(vocab_size=256)
    one, two = tmp_path / "one", tmp_path / "two"
    saved(directory, 262, one, modules_to_save=BOTH)
    saved(directory, None, two, trainable_token_indices={matrix: [258] for matrix in BOTH})
    for model, adapter, message in (
        (larger, one, r"holds 262 rows of embed, and the model has 300; .*give the model that the adapter was"),
        (smaller, two, r"is for 259 ids, the model has 256, and it lacks rows of embed for the rest; .*minorca.export"),
    ):
        with pytest.raises(UserError, match=message):
            load_model(model, torch.float32, "cpu", adapter=adapter)
    (two / "minorca.json").write_text('{"template": "chatml", "base_vocab_size": 258}')
    with pytest.raises(UserError, match="was trained on a model with 258 ids, and this one has 260"):
        load_model(directory, torch.float32, "cpu", adapter=two)
    tensors = load_file(one / "adapter_model.safetensors")
    save_file({name: t for name, t in tensors.items() if "lm_head" not in name}, one / "adapter_model.safetensors")
    with pytest.raises(UserError, match="modules_to_save is .*; but adapter_model.safetensors lacks .*lm_head.weight"):
        load_model(directory, torch.float32, "cpu", adapter=one)


def test_adapters_by_row_share_the_vocabulary(save_mistral, tmp_path):
    directory, _ = save_mistral(vocab_size=262)
    saved(directory, None, tmp_path / "adapter", **rows(*BOTH))
    with pytest.raises(UserError, match="trains rows or all of embed and head, .*merge it .python -m minorca.export"):
        load_adapters(load_model(directory, torch.float32, "cpu"), {"one": tmp_path / "adapter"})
    with pytest.raises(UserError, match="serve the result as the model"):
        check_shares_vocabulary(tmp_path / "adapter")
