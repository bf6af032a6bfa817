"""A real pretrained model compared with transformers: SmolLM2-135M-Instruct."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minorca import load_model, load_tokenizer, render_chat
from minorca.generate import generate
from tests.helpers import relative_error

MESSAGES = [
    {"role": "system", "content": "You are a helpful assistant."},
    {
        "role": "user",
        "content": "Why is the sky blue? Explain it to a five-year-old — in «simple» words.\n\n1. first\n2. then",
    },
]


@pytest.fixture(scope="module")
def both(smollm2):
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    return (
        load_model(smollm2, torch.float32, "cpu"),
        theirs,
        load_tokenizer(smollm2),
        AutoTokenizer.from_pretrained(smollm2),
    )


@pytest.mark.parametrize(
    "messages", [MESSAGES, MESSAGES[1:], [*MESSAGES, {"role": "assistant", "content": " Light!"}, MESSAGES[1]]]
)
def test_chat_ids_equal_transformers(both, messages):
    _, _, tok, theirs = both
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert render_chat(tok, messages) == expected
    assert tok.decode(expected) == theirs.decode(expected, skip_special_tokens=True)


def test_logits_equal_transformers(both):
    ours, theirs, tok, _ = both
    ids = torch.tensor(render_chat(tok, MESSAGES) + tok.encode(Path(__file__).read_text()))[:600]
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
        logits = ours(ids)
    assert relative_error(logits, expected) <= 1e-5 and torch.equal(logits.argmax(-1), expected.argmax(-1))


@pytest.mark.slow
def test_200_greedy_tokens_equal_transformers(both):
    ours, theirs, tok, _ = both
    prompt = render_chat(tok, MESSAGES)
    options = {"max_new_tokens": 200, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = torch.tensor([prompt])
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
    assert generate(ours, [prompt], max_new_tokens=200) == [expected]
