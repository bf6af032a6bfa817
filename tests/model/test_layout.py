"""Names and shapes of tensors are those of transformers, PEFT and Mistral's own files."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

from minorca.model.architecture import read_architecture
from minorca.model.layout import GROUPS, TARGETS, adapted_by, projections, source_tensors
from tests.files.test_weights import as_consolidated


@pytest.mark.parametrize("tied", [False, True])
def test_names_and_shapes_are_those_of_the_files(tied, save_mistral):
    directory, theirs = save_mistral(tie_word_embeddings=tied, num_hidden_layers=3, head_dim=8)
    arch = read_architecture(directory)
    tensors = [tensor for stacked in source_tensors(arch, "huggingface").values() for tensor in stacked]
    expected = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    if tied:
        del expected["lm_head.weight"]
    assert {tensor.name: tensor.shape for tensor in tensors} == expected


def test_mistrals_own_names_and_shapes(save_mistral):
    directory, _ = save_mistral()
    arch = read_architecture(directory)
    as_consolidated(directory)
    saved = load_file(directory / "consolidated.safetensors")
    expected = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    tensors = [tensor for stacked in source_tensors(arch, "mistral").values() for tensor in stacked]
    assert {tensor.name: tensor.shape for tensor in tensors} == expected
    heads = {tensor.name.split(".")[-2]: tensor.rotary_heads for tensor in tensors}
    assert (heads["wq"], heads["wk"], heads["wv"]) == (4, 2, 0)


def test_adapters_have_pefts_names_and_shapes(save_mistral):
    directory, base = save_mistral()
    arch = read_architecture(directory)
    config = LoraConfig(r=3, target_modules=[f"{target}_proj" for target in TARGETS], task_type="CAUSAL_LM")
    adapters: dict[str, torch.Tensor] = get_peft_model_state_dict(get_peft_model(base, config))
    expected = {name: tuple(tensor.shape) for name, tensor in adapters.items()}
    ours = {}
    for layer in range(arch.layers):
        for part in (part for parts in projections(arch).values() for part in parts):
            ours[part.peft_name(layer, "A")] = (3, part.in_features)
            ours[part.peft_name(layer, "B")] = (part.out_features, 3)
            assert adapted_by(part.peft_name(layer, "A")) == (layer, part.name)
    assert ours == expected
    assert adapted_by("base_model.model.lm_head.lora_A.weight") == (0, "head")
    assert adapted_by("base_model.model.model.norm.lora_A.weight") is None


def test_parts_of_a_stacked_projection_follow_one_another(save_mistral):
    stacked = projections(read_architecture(save_mistral()[0]))
    assert tuple(stacked) == GROUPS and tuple(part.name for parts in stacked.values() for part in parts) == TARGETS
    for parts in stacked.values():
        assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
        assert len({part.in_features for part in parts}) == 1
