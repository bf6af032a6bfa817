"""What a request asks of its prompt and of its answer's beginning: log-probabilities, ranks, a minimum length."""

import pytest
import torch

from minorca import load_model
from minorca.errors import UserError
from minorca.generate import prompt_scores
from minorca.generate.engine import Engine
from minorca.generate.request import Request
from minorca.generate.sampling import Sampling
from tests.generate.test_engine import ids, logprobs, prompt, run


@pytest.fixture
def both(save_mistral):
    """Ours and transformers'."""
    directory, theirs = save_mistral(sliding_window=None, initializer_range=0.2)
    return load_model(directory, torch.float32, "cpu"), theirs


@pytest.mark.parametrize("chunk, rows", [(7, 256), (512, 5), (1, 1), (512, 256)])
def test_log_probabilities_of_prompts_are_transformers(chunk, rows, both, monkeypatch):
    """With any chunks, and beside other requests; where a slot has the same prompt, too."""
    monkeypatch.setattr(prompt_scores, "ROWS", rows)
    model, theirs = both
    asked = prompt(40)
    with torch.no_grad():
        expected_TV = theirs(torch.tensor([asked])).logits[0, :-1].log_softmax(-1)
    own_T = expected_TV.gather(-1, torch.tensor(asked[1:])[:, None])[:, 0]
    requests = [
        Request(asked, 5),
        Request(asked, 5, prompt_logprobs=3),
        Request(asked, 0, prompt_logprobs=0),
        Request(prompt(9), 2, prompt_logprobs=1),
    ]
    plain, scored, alone, other = run(Engine(model, 3, 100, chunk=chunk), *requests)
    assert ids(scored) == ids(plain) and plain[0].prompt is None and scored[1].prompt is None
    assert len(other[0].prompt) == 8
    # The prompt alone.
    (only,) = alone
    assert (only.id, only.finish_reason, only.logprob) == (-1, "length", None)
    assert [token.top for token in only.prompt] == [[]] * 39
    for tokens in (scored, alone):
        assert [token.logprob for token in tokens[0].prompt] == pytest.approx(own_T.tolist(), abs=1e-3)
        assert [token.rank for token in tokens[0].prompt] == (1 + (expected_TV > own_T[:, None]).sum(-1)).tolist()
    values_T3, ids_T3 = expected_TV.topk(3)
    for token, values, likeliest in zip(scored[0].prompt, values_T3.tolist(), ids_T3.tolist()):
        assert [i for i, _ in token.top] == likeliest
        assert [value for _, value in token.top] == pytest.approx(values, abs=1e-3)


def test_a_slot_that_scored_its_prompt_changes_no_bit_of_others(both):
    """Which take over its logits after the same prompt."""
    model = both[0]
    (alone,) = run(Engine(model, 3, 100), Request(prompt(70), 12, logprobs=128))
    _, beside = run(
        Engine(model, 3, 100), Request(prompt(70), 12, prompt_logprobs=2), Request(prompt(70), 12, logprobs=128)
    )
    assert ids(beside) == ids(alone) and torch.equal(logprobs(beside), logprobs(alone))


def test_a_conversation_that_is_scored_is_prefilled_whole(both):
    engine = Engine(both[0], 1, 200)
    run(engine, Request(prompt(30), 5))
    (tokens,) = run(engine, Request(prompt(30) + [5], 2, prompt_logprobs=0))
    assert len(tokens[0].prompt) == 30


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_p=0.9, seed=3)])
def test_no_stop_id_comes_before_the_minimum(sampling, both):
    """And from there on the answer may end: the first ids are those of a model without the stop ids."""
    model = both[0]
    (free,) = run(Engine(model, 1, 100), Request(prompt(20), 30, sampling))
    stops = set(ids(free)[:3])
    (short,) = run(Engine(model, 1, 100), Request(prompt(20), 30, sampling, stops))
    assert len(short) == 1
    for minimum in (1, 8):
        asked = lambda: Request(prompt(20), 30, sampling, stops, min_new_tokens=minimum)  # noqa: E731, B023
        (tokens,) = run(Engine(model, 2, 100), asked())
        assert not stops & set(ids(tokens)[:minimum])
        assert len(tokens) == 30 or tokens[-1].id in stops
        beside, _ = run(Engine(model, 2, 100), asked(), Request(prompt(33), 30, Sampling(frequency_penalty=1.0)))
        assert ids(beside) == ids(tokens)
    # Ids that only the tokenizer has are no harm.
    run(Engine(model, 1, 100), Request(prompt(20), 3, sampling, {500}, min_new_tokens=2))


@pytest.mark.parametrize(
    "field, fields",
    [
        ("max_new_tokens", {"max_new_tokens": 0}),
        ("min_new_tokens", {"max_new_tokens": 5, "min_new_tokens": 6}),
        ("prompt_logprobs", {"prompt_logprobs": 129}),
        ("stop_ids", {"stop_ids": range(128), "min_new_tokens": 1}),
        ("logit_bias", {"sampling": Sampling(logit_bias={128: 1.0})}),
    ],
)
def test_what_cannot_be_served_is_named(field, fields, both):
    with pytest.raises(UserError) as error:
        Engine(both[0], 1, 100).check(Request(prompt(5), **fields))
    assert [problem.field for problem in error.value.problems] == [field]
