"""What is printed after a merge, beside the same numbers of whole models, and that it shows what rounding loses."""

import re

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MistralForCausalLM

from minorca import load_model, load_tokenizer, render_chat
from minorca.export.__main__ import main
from minorca.export.contents import read_contents
from minorca.export.effect import CONVERSATION, TOKENS, effect_of, logits_by_layer, readers, sample_tokens
from minorca.export.merging import Deltas, Merge, WeightedAdapter
from tests.export.test_export import adapted
from tests.files.test_adapters import saved
from tests.files.test_mistral_lora import write_lora
from tests.files.test_weights import as_consolidated
from tests.helpers import relative_error, save_tokenizer

RANDOM = sample_tokens(None, None, 128)[0]
NUMBER = r"([-+.e\d]+)"
LINE = (
    f"logits differ by {NUMBER} in the mean, {NUMBER} at most; the same token is likeliest in {NUMBER} of 128 places; "
    f"KL {NUMBER} nats a token in the mean, {NUMBER} at most\n"
)


def logits(directory, adapter=None) -> Tensor:
    with torch.no_grad():
        return load_model(directory, torch.float32, "cpu", adapter=adapter)(RANDOM).double()


def merge(directory, output, *options) -> None:
    main(["--model", str(directory), "--output", str(output), *map(str, options)])


@pytest.mark.parametrize("layout", ["hf", "consolidated"])
def test_the_numbers_are_those_of_whole_models(layout, save_mistral, tmp_path, capsys):
    """PEFT's model of the bf16 base, in fp32, against the files that were written in bf16."""
    directory, theirs = save_mistral()
    theirs.to(torch.bfloat16).save_pretrained(directory)
    # not theirs.float(), whose rotary frequencies stay rounded
    with_adapter = saved(
        MistralForCausalLM.from_pretrained(directory, dtype=torch.float32),
        tmp_path / "adapter",
        target_modules="all-linear",
    )
    merge(directory, tmp_path / "out", "--adapter", tmp_path / "adapter", "--format", layout)
    printed = capsys.readouterr().out
    with torch.no_grad():
        adapted_TV = with_adapter(RANDOM[None]).logits[0].double()
    base_TV, written_TV = logits(directory), logits(tmp_path / "out")
    difference = (written_TV - adapted_TV).abs()
    p, q = adapted_TV.softmax(1), written_TV.softmax(1)
    kl = (p * (p.log() - q.log())).sum(1)
    change = adapted_TV - base_TV
    expected = [difference.mean(), difference.max(), (p.argmax(1) == q.argmax(1)).sum(), kl.mean(), kl.max()]
    assert difference.mean() > 1e-3 and kl.mean() > 1e-6
    line = re.search(LINE, printed)
    assert line and [float(number) for number in line.groups()] == pytest.approx([float(e) for e in expected], rel=0.05)
    share = float(((written_TV - base_TV) * change).sum() / change.square().sum())
    assert f"rounding to bfloat16 keeps {share:.0%} of the adapter's change of the logits" in printed
    assert "on 128 random ids" in printed


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 0.5, "b": -1.0}])
def test_adapters_beside_the_base(weights, save_mistral, tmp_path):
    """Layer by layer, one in PEFT's format and one of mistral-finetune's; alone as the model computes it."""
    directory, base = save_mistral(sliding_window=8, num_hidden_layers=3)
    saved(base, tmp_path / "a", target_modules=["q_proj", "v_proj", "down_proj"], alpha_pattern={"v_proj": 2})
    as_consolidated(directory)
    write_lora(directory, tmp_path / "b", rank=7)
    chosen = Merge(tuple(WeightedAdapter(tmp_path / name, weight) for name, weight in weights.items()))
    contents = read_contents(directory, chosen)
    plain = readers(read_contents(directory, None).tensors)
    beside = logits_by_layer(contents.source.arch, RANDOM, plain, Deltas(contents.source.arch, chosen))
    assert relative_error(beside, logits_by_layer(contents.source.arch, RANDOM, readers(contents.tensors))) < 1e-5
    assert relative_error(beside, logits(directory)) > 1e-2
    if weights == {"a": 1.0}:
        assert relative_error(beside, logits(directory, tmp_path / "a")) < 1e-5


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_an_update_that_rounding_loses(method, save_mistral, tmp_path, capsys, caplog):
    """Smaller than half a step of bf16 nearly everywhere: the files are the base, and the numbers say so."""
    directory, theirs = save_mistral()
    theirs.to(torch.bfloat16).save_pretrained(directory)
    adapted(theirs.float(), tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    tensors = {name: value * (1e-5 if "lora_B" in name else 1) for name, value in tensors.items()}
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    merge(directory, tmp_path / "out", "--adapter", tmp_path / "adapter", "--merge", method)
    found, base = (load_file(path / "model.safetensors") for path in (tmp_path / "out", directory))
    changed = [int((found[name] != base[name]).sum()) / base[name].numel() for name in base]
    assert max(changed) < 0.01
    share = re.search(r"rounding to bfloat16 keeps (-?\d+)% of the adapter's change", capsys.readouterr().out)
    assert share and abs(int(share[1])) <= 5
    assert "rounding to bfloat16 loses most of the adapter's effect" in caplog.text


def test_what_the_logits_are_compared_on(smollm2, tmp_path, save_mistral):
    """A conversation in the model's template where it has one, else text, else random ids; the same every time."""
    tok = load_tokenizer(smollm2)
    tokens, kind = sample_tokens(tok, "chatml", tok.vocab_size)
    assert kind == "128 tokens of an English answer in the template chatml"
    rendered = render_chat(tok, CONVERSATION, add_generation_prompt=False, template="chatml")
    assert tokens.tolist() == rendered[:TOKENS] and len(rendered) >= TOKENS
    tokens, kind = sample_tokens(tok, None, tok.vocab_size)
    assert kind == "128 tokens of English text" and tok.decode(tokens.tolist()).startswith("Why is the sky blue")
    assert sample_tokens(tok, "chatml", 40)[1] == "128 random ids"
    tokens, kind = sample_tokens(None, None, 40)
    assert kind == "128 random ids" and int(tokens.max()) < 40 and torch.equal(tokens, sample_tokens(None, None, 40)[0])
    directory, _ = save_mistral(vocab_size=260)
    save_tokenizer(directory)
    tok = load_tokenizer(directory)
    tok.chat_template = tok.chat_templates["default"] = "{{ raise_exception('no answers, please') }}"
    assert sample_tokens(tok, "jinja", 260)[1] == "128 tokens of English text"


def test_nothing_changes():
    """No share of no change; equal logits have no divergence."""
    logits_TV = torch.randn(5, 7, dtype=torch.float64)
    effect = effect_of(logits_TV, logits_TV, logits_TV)
    assert (effect.share, effect.largest_difference, effect.same_top, effect.largest_kl) == (None, 0, 5, 0)


def test_embedding_and_head_alone(save_mistral, tmp_path, capsys):
    directory, base = save_mistral()
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    merge(directory, tmp_path / "out", "--adapter", tmp_path / "adapter")
    assert "the adapter changes embedding and head alone" in capsys.readouterr().out


def test_logits_that_overflow(save_mistral, tmp_path, capsys, caplog):
    """Weights that fp32 holds, and logits that it does not: they are not said to be equal."""
    directory, theirs = save_mistral()
    adapted(theirs, tmp_path / "adapter")
    merge(directory, tmp_path / "out", "--adapter", f"{tmp_path / 'adapter'}=1e38")
    assert "logits are NaN or infinite, so that nothing is compared" in caplog.text
    assert "the adapter changes no logits" not in capsys.readouterr().out
