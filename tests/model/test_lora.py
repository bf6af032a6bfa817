"""Adapters compared with PEFT: files, logits and gradients."""

import json
import sys

import pytest
import torch
from peft import PeftModel

import minorca.model.lora
from minorca import UserError, load_model
from minorca.files.adapters import read_adapter_settings, save_adapter
from minorca.model.architecture import read_architecture
from minorca.model.attention import PackedAttention
from minorca.model.build import build_model
from minorca.model.layout import TARGETS
from minorca.model.lora import LoRASettings, adapter_parameters, add_adapters, init_adapters, pad_for_adapters
from minorca_kernels import linear_cross_entropy, rope_tables
from minorca_kernels.operator import INTERPRETED
from tests.helpers import gradients_of, random_adapter, relative_error

TOKENS = torch.randint(128, (40,), generator=torch.Generator().manual_seed(1))
CHOICES = [TARGETS, ("q", "v"), ("k", "up"), ("o", "down"), ("gate",)]


@pytest.mark.parametrize("targets", CHOICES, ids="+".join)
@pytest.mark.parametrize("rslora", [False, True])
def test_pefts_adapter_loads_here(targets, rslora, save_mistral, tmp_path):
    """The logits of the base model with the adapter, unmerged, are PEFT's."""
    directory, base = save_mistral(sliding_window=16)
    theirs = random_adapter(base, tmp_path / "adapter", targets, r=3, lora_alpha=5, use_rslora=rslora)
    ours = load_model(directory, torch.float32, "cpu", adapter=tmp_path / "adapter")
    with torch.no_grad():
        assert relative_error(ours(TOKENS), theirs(TOKENS[None]).logits[0]) <= 1e-5


@pytest.mark.parametrize("targets", CHOICES, ids="+".join)
def test_our_adapter_loads_in_peft(targets, save_mistral, tmp_path):
    """An adapter that is created and saved here has the same logits in PEFT."""
    directory, base = save_mistral()
    settings = LoRASettings(rank=4, alpha=6, targets=targets, rslora=True)
    model = load_model(directory, torch.float32, "cpu")
    add_adapters(model, settings)
    init_adapters(model, seed=3)
    for parameter in adapter_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.3)
    out = tmp_path / "ours"
    out.mkdir()
    save_adapter(out, {n: p.detach() for n, p in adapter_parameters(model).items()}, settings, str(directory))
    with torch.no_grad():
        plain = base(TOKENS[None]).logits[0]
        theirs = PeftModel.from_pretrained(base, out)(TOKENS[None]).logits[0]
        assert relative_error(model(TOKENS), theirs) <= 1e-5 < relative_error(plain, theirs)


def test_gradients_equal_pefts(save_mistral, tmp_path):
    """The gradient of every adapter tensor, for a loss over some of the positions, within 1e-4."""
    directory, base = save_mistral(sliding_window=16, tie_word_embeddings=True)
    theirs = random_adapter(base, tmp_path / "adapter", TARGETS, r=3)
    ours = load_model(directory, torch.float32, "cpu", adapter=tmp_path / "adapter")
    rows = torch.arange(10, 39)
    ours(TOKENS, head=lambda x, w: linear_cross_entropy(x[rows], w.weight, TOKENS[rows + 1]).sum()).backward()
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_" in name)
    logits = theirs(TOKENS[None]).logits[0]
    torch.nn.functional.cross_entropy(logits[rows], TOKENS[rows + 1], reduction="sum").backward()
    trained = {name.replace(".default", ""): p for name, p in theirs.named_parameters() if p.requires_grad}
    expected = gradients_of(trained)
    gradients = gradients_of(adapter_parameters(ours))
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) <= 1e-4, name


def test_the_start_is_pefts_and_depends_on_seed_and_name_alone(save_mistral):
    """B is zero; A is uniform with PEFT's bound; another seed gives other numbers, other targets the same ones."""
    arch = read_architecture(save_mistral()[0])

    def start(seed, targets):
        model = build_model(arch, torch.float32)
        add_adapters(model, LoRASettings(4, 8, targets))
        model.to_empty(device="cpu")
        init_adapters(model, seed)
        return adapter_parameters(model)

    one = start(0, TARGETS)
    again = start(0, TARGETS)
    few = start(0, ("q",))
    other = start(1, TARGETS)
    for name, values in one.items():
        assert torch.equal(values, again[name]) and (name not in few or torch.equal(values, few[name]))
        if "lora_B" in name:
            assert not values.any()
        else:
            bound = values.shape[1] ** -0.5
            assert 0.9 * bound < values.abs().max() <= bound and not torch.equal(values, other[name])


@pytest.mark.parametrize(
    "field, value",
    [
        ("bias", "all"),
        ("use_dora", True),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"q_proj": 2.0}),
        ("alpha_pattern", ["q_proj"]),
        ("alpha_pattern", {"(": 1}),
        ("alpha_pattern", {r"(q)\1": 1}),
        ("alpha_pattern", {"x" * 1001: 1}),
        ("trainable_token_indices", [-1]),
        ("target_parameters", ["mlp.experts"]),
        ("layer_replication", [[0, 2]]),
        ("modules_to_save", ["norm"]),
        ("r", 0),
        ("lora_alpha", 10**400),
        ("init_lora_weights", "olora"),
        ("peft_type", "IA3"),
    ],
)
def test_what_we_would_compute_differently_is_refused(field, value, save_mistral, tmp_path):
    _, base = save_mistral()
    random_adapter(base, tmp_path / "adapter", ("q",))
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UserError, match=f"adapter_config.json: {field} is"):
        read_adapter_settings(tmp_path / "adapter")


def test_another_models_adapter_is_refused(save_mistral, tmp_path):
    directory, _ = save_mistral()
    _, wider = save_mistral(hidden_size=96)
    _, deeper = save_mistral(num_hidden_layers=3)
    for name, model, message in (
        ("wide", wider, "has shape"),
        ("deep", deeper, "base_model.model.model.layers.2"),
    ):
        random_adapter(model, tmp_path / name, TARGETS)
        with pytest.raises(UserError, match=message):
            load_model(directory, torch.float32, "cpu", adapter=tmp_path / name)


def test_kept_adapters_are_never_stale(save_mistral, monkeypatch):
    """Whatever changes them, the rounded copies give the loss and gradients of a model that rounds in every call."""
    monkeypatch.setattr(minorca.model.lora, "uses_triton", lambda x: True)
    monkeypatch.setattr(sys.modules["minorca_kernels.lora_linear"], "MIN_TOKENS_AUGMENTED", 0)
    directory, _ = save_mistral()
    kept, plain = models = [load_model(directory, torch.float32, "cpu") for _ in range(2)]
    for model in models:
        add_adapters(model, LoRASettings(4, 8, ("q", "k", "v", "o")))
    pad_for_adapters(kept)
    assert {p.base.kind for _, p in kept.projections()} == {"padded", "dense"}
    init_adapters(kept, seed=0)
    parameters = adapter_parameters(kept)
    optimizer = torch.optim.AdamW(parameters.values(), 0.01, fused=True)

    def double():
        with torch.inference_mode():
            for parameter in parameters.values():
                parameter.mul_(2)

    seen = set()
    for change in (optimizer.step, optimizer.step, double):
        change()
        for name, parameter in adapter_parameters(plain).items():
            parameter.data.copy_(parameters[name])
        with torch.inference_mode():
            seen.add(kept(TOKENS).square().mean().item())
        losses = [model(TOKENS).square().mean() for model in models]
        gradients = [
            torch.autograd.grad(loss, [*adapter_parameters(model).values()]) for loss, model in zip(losses, models)
        ]
        assert torch.allclose(*losses, rtol=1e-5)
        assert all(torch.allclose(ours, theirs, 1e-4, 1e-5) for ours, theirs in zip(*gradients))
        for parameter, gradient in zip(parameters.values(), gradients[0]):
            parameter.grad = gradient
    # without gradients the first step does nothing
    assert len(seen) == 3


@pytest.mark.skipif(INTERPRETED, reason="torch.compile cannot trace the interpreter")
def test_a_block_compiles_without_a_break(save_mistral):
    """With adapters, packed documents and a window: one graph, and the same values and gradients."""
    model = load_model(save_mistral(sliding_window=8)[0], torch.float32, "cpu")
    add_adapters(model, LoRASettings(rank=4, alpha=8))
    init_adapters(model, seed=0)
    attend = PackedAttention(torch.tensor([0, 11, 40]), 40, 8, torch.device("cpu"))
    tables = rope_tables(attend.positions, 16, 1e4)
    x = torch.randn(40, 64, requires_grad=True)
    block = model.layers[0]
    _, qkv = next(model.projections())
    assert qkv.lora
    adapters = list(qkv.lora.a.values())
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    outs = [function(x, None, *tables, attend)[0] for function in (block, compiled)]
    gradients = [torch.autograd.grad(out.square().sum(), [x, *adapters]) for out in outs]
    assert torch.equal(*outs) and all(map(torch.equal, *gradients))
