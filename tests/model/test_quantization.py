"""Models that are quantized to NF4 while they load: what is stored where, and how much memory that takes."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.autograd import profiler
from torch.testing._internal.distributed.fake_pg import FakeStore

from minorca import UserError, load_model
from minorca.config import ParallelConfig
from minorca.files.adapters import RECORD
from minorca.files.weights import load_weights, open_model
from minorca.generate import __main__ as generate_command
from minorca.generate import engine, generate
from minorca.model.build import build_model, prepack
from minorca.model.quantization import Quantization
from minorca.serve import __main__ as serve_command
from minorca.train import parallel
from minorca_kernels import NF4Weight, PrepackedNF4Weight, local_part, prepacked_nf4
from tests.files.test_weights import as_bin, as_consolidated
from tests.helpers import random_adapter, relative_error, save_tokenizer

SIZES = {"intermediate_size": 192}
TOKENS = torch.randint(128, (40,), generator=torch.Generator().manual_seed(1))


def test_projections_are_quantized_and_nothing_else(save_mistral):
    directory, _ = save_mistral(**SIZES)
    model = load_model(directory, torch.bfloat16, "cpu", quantize="nf4")
    assert {type(projection.base) for _, projection in model.projections()} == {NF4Weight}
    dense = load_model(directory, torch.bfloat16, "cpu")
    ours, theirs = (dict(one.named_parameters()) for one in (model, dense))
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in ours.items() if ".base." not in name)
    assert "head.weight" in ours and ours["head.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{"quantize": "nf4"}, {"quantize": "nf4", "double_quant": False}])
def test_no_more_than_two_layers_are_ever_dense(options, save_mistral):
    """Beside what the model keeps, by torch's own count of its allocations."""
    directory, theirs = save_mistral(
        hidden_size=256, intermediate_size=512, num_hidden_layers=12, num_attention_heads=4, num_key_value_heads=2
    )
    theirs.to(torch.bfloat16).save_pretrained(directory)
    layer = sum(parameter.nbytes for parameter in theirs.model.layers[0].parameters())
    mapped = (directory / "model.safetensors").stat().st_size
    profile: Any = profiler.profile(profile_memory=True, use_cpu=True)
    with profile:
        model = load_model(directory, torch.bfloat16, "cpu", **options)
    events = sorted(profile.kineto_results.events(), key=lambda event: event.start_ns())
    # the file itself is mapped, not read
    sizes = [event.nbytes() for event in events if event.name() == "[memory]" and abs(event.nbytes()) < mapped - 10**5]
    held = torch.tensor(sizes).cumsum(0)
    kept = sum(parameter.nbytes for parameter in model.parameters())
    assert held[-1] == pytest.approx(kept, abs=10**5) and kept < 4 * layer
    assert held.max() - kept < 2 * layer


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("ranks", [2, 5])
def test_each_rank_keeps_its_rows(ranks, double_quant, save_mistral):
    """Of codes and scales, which it quantizes as one rank does."""
    directory, _ = save_mistral(**SIZES)
    source = open_model(directory, Quantization(double_quant))
    whole = load_model(directory, torch.float32, "cpu", quantize="nf4", double_quant=double_quant)
    stored = 0
    for rank in range(ranks):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
        try:
            model = build_model(source.arch, torch.float32, source.quantization)
            world: Any = SimpleNamespace(size=ranks, device=torch.device("cpu"))
            parallel.shard(model, ParallelConfig(shard="fsdp"), world, torch.float32)
            model.to_empty(device="cpu")
            load_weights(model, source)
            for (_, ours), (_, theirs) in zip(model.projections(), whole.projections()):
                for part, complete in zip(ours.base.parameters(), theirs.base.parameters()):
                    local, first = local_part(part)
                    assert torch.equal(local, complete[first : first + len(local)])
                    stored += local.nbytes
        finally:
            dist.destroy_process_group()
    assert stored == sum(p.nbytes for _, projection in whole.projections() for p in projection.base.parameters())


@pytest.mark.parametrize("layout", [as_bin, as_consolidated])
def test_every_layout_is_quantized_alike(layout, save_mistral):
    """Mistral's own files too, whose query and key rows have another order."""
    directory, _ = save_mistral(**SIZES)
    expected = load_model(directory, torch.float32, "cpu", quantize="nf4")
    layout(directory)
    found = load_model(directory, torch.float32, "cpu", quantize="nf4")
    for (name, ours), (_, theirs) in zip(found.named_parameters(), expected.named_parameters()):
        assert torch.equal(ours, theirs), name


def test_prepacking_makes_it_dense_without_bitsandbytes(save_mistral, monkeypatch):
    """In the layout that is fast; one sequence in bf16 needs none."""
    monkeypatch.setattr(prepacked_nf4, "_bitsandbytes", lambda: None)
    directory, _ = save_mistral(**SIZES)
    for dtype, rows, kind, error in ((torch.float32, 8, "prepacked", 1e-4), (torch.bfloat16, 1, "dense", 0.05)):
        model = load_model(directory, dtype, "cpu", quantize="nf4")
        with torch.no_grad():
            before = model(TOKENS)
            prepack(model, rows)
            assert torch.allclose(model(TOKENS), before, atol=error)
        assert {projection.base.kind for _, projection in model.projections()} == {kind}


@pytest.mark.parametrize("double_quant", [True, False])
def test_prepacking_keeps_four_bits(double_quant, save_mistral):
    """Where bitsandbytes multiplies them: generation begins with the logits of the model that trains, but for bf16's
    rounding, and its head is prepacked like another one.
    """
    directory, _ = save_mistral(**SIZES)
    model = load_model(directory, torch.bfloat16, "cpu", quantize="nf4", double_quant=double_quant)
    base = next(model.projections())[1].base
    if not (isinstance(base, NF4Weight) and PrepackedNF4Weight.supports(base, torch.bfloat16)):
        pytest.skip("needs bitsandbytes' product, on a CPU with AVX-512's bf16")
    exact = load_model(directory, torch.float32, "cpu", quantize="nf4", double_quant=double_quant)
    with torch.no_grad():
        before, expected = model(TOKENS), exact(TOKENS)
        assert prepack(model) is model
        after = model(TOKENS)
    assert {projection.base.kind for _, projection in model.projections()} == {"prepacked_nf4"}
    assert model.head is not None and model.head.kind == "prepacked"
    assert relative_error(after, expected) < 1.2 * relative_error(before, expected)


@pytest.mark.parametrize("options", [{"quantize": "fp8"}, {"double_quant": False}, {"quantize": ["nf4"]}])
def test_what_is_not_asked_for_so(options, save_mistral):
    directory, _ = save_mistral(**SIZES)
    with pytest.raises(UserError, match="expected none or nf4|needs quantize nf4"):
        load_model(directory, torch.float32, "cpu", **options)


def test_commands_generate_from_the_base_of_training(save_mistral, tmp_path, capsys, caplog, monkeypatch):
    """And say which it is where another is given."""
    directory, theirs = save_mistral(**SIZES, vocab_size=260)
    save_tokenizer(directory)
    adapter = tmp_path / "adapter"
    random_adapter(theirs, adapter, ("q", "gate"))
    (adapter / RECORD).write_text(json.dumps({"template": "chatml", "quantize": "nf4", "double_quant": False}))
    monkeypatch.setattr(engine, "fast_dtype", lambda: torch.float32)
    said = []
    options = ["--model", str(directory), "--adapter", str(adapter), "--raw", "--prompt", "Hi", "--json"]
    for quantize in (["--quantize", "nf4", "--no-double-quant"], ["--quantize", "nf4"], []):
        caplog.clear()
        generate_command.main([*options, "--max-new-tokens", "20", *quantize])
        said.append((json.loads(capsys.readouterr().out)["text"], caplog.text))
    (right, _), (_, other), (_, plain) = said
    model = load_model(directory, torch.float32, "cpu", adapter, quantize="nf4", double_quant=False)
    tok = generate_command.load_tokenizer(directory)
    [ids] = generate(model, [tok.encode_rendered("Hi", True)], 20, stop_ids=tok.stop_ids)
    assert right == tok.decode(ids) and not said[0][1]
    assert "was trained on nf4 without double quantization, and the model has nf4 with" in other
    assert "and the model has unquantized weights; for the numbers of its training, give --quantize nf4 --no-d" in plain


def test_the_server_quantizes_too(save_mistral, monkeypatch):
    directory, _ = save_mistral(**SIZES, vocab_size=260)
    save_tokenizer(directory)
    opened = {}

    def open_engine(*_, **options):
        opened.update(options)
        raise UserError("as far as this test goes")

    monkeypatch.setattr(serve_command, "open_engine", open_engine)
    with pytest.raises(UserError, match="as far as"):
        serve_command.main(["--model", str(directory), "--port", "0", "--quantize", "nf4", "--no-double-quant"])
    assert opened == {"quantize": "nf4", "double_quant": False}
