"""What several tests share: small random models in Hugging Face's format, as transformers writes them."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

torch.set_num_threads(1)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return (torch.linalg.vector_norm(ours.double() - theirs.double()) / torch.linalg.vector_norm(theirs.double())).item()


def random_mistral(seed: int = 0, **fields) -> MistralForCausalLM:
    """A small fp32 Mistral of transformers with random weights, norms included (ones would hide a missing weight)."""
    torch.manual_seed(seed)
    config = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": None,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,
    } | fields
    model = MistralForCausalLM._from_config(MistralConfig(**config), attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


@pytest.fixture
def save_mistral(tmp_path):
    """save_mistral(**fields) -> (directory in Hugging Face's layout, transformers' model)."""

    def save(seed: int = 0, shard_size: str = "5GB", **fields):
        model = random_mistral(seed, **fields)
        directory = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(directory, max_shard_size=shard_size)
        return directory, model

    return save


def random_adapter(base, directory, targets, **config):
    """PEFT's model around `base` with a random adapter (B too, which PEFT starts at zero), saved to `directory`."""
    from peft import LoraConfig, get_peft_model

    names = [f"{target}_proj" for target in targets]
    model = get_peft_model(base, LoraConfig(target_modules=names, task_type="CAUSAL_LM", **{"r": 4} | config))
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    model.save_pretrained(directory)
    return model.eval()
