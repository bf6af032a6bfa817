"""The network compared with transformers' MistralForCausalLM, and the properties of windows and documents."""

import itertools
from typing import Any

import pytest
import torch
import transformers

from minorca import load_model
from tests.helpers import relative_error

# hidden, heads, kv heads, head_dim
SHAPES = [
    (64, 4, 2, None),
    (48, 3, 1, None),
    # as in Nemo, head_dim x heads != hidden
    (96, 9, 3, 16),
    (40, 5, 5, 8),
]
CONFIGURATIONS = [
    dict(zip(("shape", "window", "tied", "theta"), values))
    for values in itertools.product(SHAPES, (None, 1, 7, 16), (False, True), (1e4,))
] + [{"shape": SHAPES[0], "window": 16, "tied": False, "theta": 1e6}]
LENGTHS = [1, 15, 16, 17, 48]


def tokens_of(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(128, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("c", CONFIGURATIONS, ids=str)
def test_logits_equal_transformers(c, save_mistral):
    """Each document of a packed batch has transformers' logits, within 1e-5 in fp32, and the same top token."""
    hidden, heads, kv, head_dim = c["shape"]
    directory, theirs = save_mistral(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=head_dim,
        sliding_window=c["window"],
        tie_word_embeddings=c["tied"],
        rope_theta=c["theta"],
    )
    ours = load_model(directory, torch.float32, "cpu")
    documents = [tokens_of(length, seed=length) for length in LENGTHS]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(LENGTHS)])
    with torch.no_grad():
        packed = ours(torch.cat(documents), cu_seqlens).split(LENGTHS)
        for document, logits in zip(documents, packed):
            expected = theirs(document[None]).logits[0]
            assert relative_error(logits, expected) <= 1e-5
            assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def test_another_document_changes_nothing_to_the_bit(save_mistral):
    """Replacing the tokens of one packed document leaves the logits of the others bit-identical."""
    directory, _ = save_mistral(sliding_window=8)
    model = load_model(directory, torch.float32, "cpu")
    cu_seqlens = torch.tensor([0, 20, 53, 60])
    one = torch.cat([tokens_of(20), tokens_of(33, seed=1), tokens_of(7, seed=2)])
    other = torch.cat([tokens_of(20), tokens_of(33, seed=3), tokens_of(7, seed=2)])
    with torch.no_grad():
        a, b = model(one, cu_seqlens), model(other, cu_seqlens)
    assert torch.equal(a[:20], b[:20]) and torch.equal(a[53:], b[53:]) and not torch.equal(a[20:53], b[20:53])


@pytest.mark.parametrize("window", [1, 5, 16])
def test_the_gradient_reaches_the_window_and_no_further(window, save_mistral, monkeypatch):
    """With one layer, the logit at q depends on key q-W+1 and not on q-W."""
    directory, _ = save_mistral(sliding_window=window, num_hidden_layers=1)
    model = load_model(directory, torch.float32, "cpu")
    length = 48
    embedded = model.embedding(tokens_of(length)).detach().requires_grad_()
    monkeypatch.setattr(model.embedding, "forward", lambda tokens_T: embedded)
    for q in (window - 1, window, 40):
        (gradient,) = torch.autograd.grad(model(tokens_of(length))[q].sum(), embedded)
        reached = gradient.abs().sum(-1).nonzero()[:, 0].tolist()
        assert reached == list(range(max(0, q - window + 1), q + 1))


def test_cu_seqlens_must_cover_the_tokens(save_mistral):
    model = load_model(save_mistral()[0], torch.float32, "cpu")
    for wrong in ([0, 5], [1, 10], [0, 6, 4, 10], [0, 5, 5, 10]):
        with pytest.raises(ValueError, match="expected cu_seqlens to rise"):
            model(tokens_of(10), torch.tensor(wrong))


def test_a_llama_has_no_window(tmp_path):
    """transformers' Llama ignores `sliding_window`, and so does this engine."""
    fields: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 8,
    }
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).eval()
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        logits = load_model(tmp_path, torch.float32, "cpu")(tokens_of(40))
        expected = theirs(tokens_of(40)[None]).logits[0]
    assert relative_error(logits, expected) <= 1e-5
