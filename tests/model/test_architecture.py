"""Configurations in the shapes that models ship them, compared with transformers on the same files."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from minorca import UserError, load_model
from minorca.model.architecture import read_architecture
from tests.helpers import relative_error

TOKENS = torch.randint(128, (40,), generator=torch.Generator().manual_seed(0))
# as transformers 4 writes it; the window is shorter than the text
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 0.01,
    "rope_theta": 50000.0,
    "sliding_window": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
PLAIN = {"rope_type": "default", "rope_theta": 70000.0}
FULL = ["full_attention"] * 2
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}


def directory_of(directory, changes):
    """Changes the configuration; a value of ... leaves the field out."""
    values = {name: value for name, value in (MISTRAL | changes).items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(values))
    return directory


def logits_of(directory):
    with torch.no_grad():
        return load_model(directory, torch.float32, "cpu")(TOKENS)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_theta": ..., "rope_scaling": PLAIN},
        {"rope_theta": ..., "rope_parameters": PLAIN},
        {"rope_theta": None, "rope_scaling": None, "rope_parameters": PLAIN},
        {"rope_theta": ..., "rope_scaling": {"type": "default", "rope_theta": 70000}},
        {"rope_theta": ..., "rope_scaling": {"rope_theta": 70000.0}},
        {"rope_theta": 70000.0, "rope_parameters": PLAIN},
        {"rope_parameters": {"rope_type": "default"}},
        {"rope_scaling": {}},
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rope_scaling": LLAMA3 | {"factor": 1.0}},
        {"rope_theta": ...},
        {"rms_norm_eps": ...},
        {"sliding_window": None},
        {"head_dim": None, "quantization_config": None},
        {"layer_types": None},
        {"hidden_act": "swish", "torch_dtype": "bfloat16", "use_cache": False, "attention_dropout": 0.1},
        {"use_sliding_window": False, "max_window_layers": 1, "partial_rotary_factor": 1.0},
        {"layer_types": ["sliding_attention"] * 2},
        {"layer_types": FULL},
        {"model_type": "ministral", "layer_types": FULL},
        LLAMA,
        LLAMA | {"rope_theta": ..., "rope_scaling": PLAIN, "attention_bias": False, "mlp_bias": False},
        LLAMA | {"rope_scaling": None, "pretraining_tp": 1, "rope_interleaved": False, "head_dim": ...},
    ],
    ids=str,
)
def test_logits_are_transformers(changes, save_mistral):
    directory = directory_of(save_mistral()[0], changes)
    theirs = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        assert relative_error(logits_of(directory), theirs(TOKENS[None]).logits[0]) <= 1e-5


@pytest.mark.parametrize(
    "field, absent",
    [
        ("rope_theta", ...),
        ("rms_norm_eps", ...),
        ("tie_word_embeddings", ...),
        ("max_position_embeddings", ...),
        ("hidden_act", ...),
        ("layer_types", ...),
        # as many as there are query heads
        ("num_key_value_heads", 4),
        ("head_dim", 16),
    ],
)
def test_null_is_absent(field, absent, tmp_path):
    """Where transformers 5 refuses null, too."""
    null = read_architecture(directory_of(tmp_path, {field: None}))
    assert null == read_architecture(directory_of(tmp_path, {field: absent}))


@pytest.mark.parametrize(
    "layer_types, other",
    [(FULL, {"rope_type": "yarn", "factor": 4.0}), (FULL, None), (None, PLAIN)],
)
def test_rotary_settings_by_layer_type(layer_types, other, save_mistral):
    """Those of the types that layers have count: the same logits as from one object for all layers."""
    directory, _ = save_mistral()
    window = {"layer_types": layer_types, "rope_theta": ...}
    expected = logits_of(directory_of(directory, window | {"rope_parameters": PLAIN}))
    by_type = {"full_attention": PLAIN, "sliding_attention": other}
    assert torch.equal(logits_of(directory_of(directory, window | {"rope_parameters": by_type})), expected)
    assert not torch.equal(logits_of(directory_of(directory, window)), expected)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rope_scaling": PLAIN}, r"different bases .*\(rope_theta 50000.0, rope_scaling.rope_theta 70000.0\)"),
        ({"rope_theta": ..., "rope_scaling": PLAIN, "rope_parameters": PLAIN | {"rope_theta": 1e6}}, "different bases"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling is"),
        ({"rope_scaling": {"type": "dynamic", "factor": 1.0}}, "rope_scaling is"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is"),
        ({"rope_scaling": LLAMA3 | {"factor": 8.0}}, "rope_scaling is"),
        ({"rope_scaling": [1]}, "rope_scaling is"),
        ({"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}}, "rope_parameters is"),
        ({"rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": 0.1}}, "rope_parameters is"),
        ({"rope_parameters": {"full_attention": PLAIN, "sliding_attention": None}}, "rope_parameters is"),
        (
            {
                "rope_theta": ...,
                "rope_parameters": {"full_attention": PLAIN, "sliding_attention": PLAIN | {"rope_theta": 1}},
            },
            "different bases",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
        ({"layer_types": []}, "layer_types is"),
        ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu'; a Mistral network has 'silu' or 'swish'"),
        ({"attention_bias": True, "mlp_bias": True}, r"attention_bias is True.*mlp_bias is True"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0; a Mistral network has none"),
        ({"logit_scale": 0.0625}, "logit_scale is"),
        ({"attn_temperature_tuning": True}, "attn_temperature_tuning is"),
        ({"llama_4_scaling": {"beta": 0.1}}, "llama_4_scaling is"),
        ({"query_pre_attn_scalar": 256}, "query_pre_attn_scalar is"),
        ({"num_local_experts": 8}, "num_local_experts is"),
    ],
    ids=str,
)
def test_what_changes_the_numbers_is_refused_by_name(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_architecture(directory_of(tmp_path, changes))
