"""Log-probabilities of requests that share beginnings: transformers', and the same bits in any company."""

import itertools
import random

import pytest
import torch

from minorca import load_model
from minorca.evaluate.scoring import Request, Scorer, Sizes, build_trie, plan_chunks
from minorca.evaluate.tiled_attention import Tiles
from minorca.model.build import prepack
from minorca.model.network import Mistral
from tests.helpers import random_adapter

# several chunks, tiles and steps of each kind for the requests below
SIZES = Sizes(32, 8, Tiles(4, 16, 3))
VOCABULARY = 260


def draw_requests(seed: int = 0) -> list[Request]:
    """Of a common beginning, questions, and choices of a token or more: long, short, repeated, beginnings of others."""
    draw = random.Random(seed)

    def ids(count: int) -> list[int]:
        return draw.choices(range(VOCABULARY), k=count)

    requests: list[Request] = [(ids(1), ids(1)), (ids(70), ids(9))]
    beginning = ids(40)
    for length in (0, 1, 3, 20, 50):
        context = beginning + ids(length)
        requests += [(context, ids(count)) for count in (1, 1, 1, 4)]
    context, continuation = requests[-1]
    requests += [
        (context, continuation),
        ([*context, *continuation[:2]], continuation[2:]),
        (context[:-1], context[-1:]),
    ]
    draw.shuffle(requests)
    return requests


@torch.no_grad()
def expected(theirs, requests: list[Request]) -> list[tuple[float, bool]]:
    """One request at a time, in fp64."""
    theirs = theirs.double()
    results = []
    for context, continuation in requests:
        ids = torch.tensor([[*context, *continuation]])
        logps = theirs(ids).logits[0, len(context) - 1 : -1].log_softmax(1)
        target = torch.tensor(continuation)
        is_greedy = bool((logps.argmax(1) == target).all())
        results.append((logps.gather(1, target[:, None]).sum().item(), is_greedy))
    return results


# transformers rotates by tables in fp32
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-5), (torch.float32, 1e-4)])
@pytest.mark.parametrize("window", [None, 7, 30])
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (3, 3)])
def test_scores_are_those_of_transformers(dtype, bound, window, heads, kv_heads, save_mistral):
    directory, theirs = save_mistral(
        vocab_size=VOCABULARY,
        sliding_window=window,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=16,
        initializer_range=0.2,
    )
    requests = draw_requests()
    for sizes in (SIZES, None):
        scored = Scorer(load_model(directory, dtype, "cpu"), sizes).score(requests)
        for (logp, is_greedy), (reference, greedy) in zip(scored, expected(theirs, requests), strict=True):
            assert logp == pytest.approx(reference, abs=bound) and is_greedy == greedy


MODELS = ["float32", "bfloat16", "window", "adapter", "nf4", "prepacked", "prepacked_nf4"]


@pytest.fixture(params=MODELS)
def model(request, save_mistral, tmp_path) -> Mistral:
    window = 20 if request.param == "window" else None
    directory, theirs = save_mistral(vocab_size=VOCABULARY, intermediate_size=128, sliding_window=window)
    dtype = torch.bfloat16 if request.param in ("bfloat16", "prepacked_nf4") else torch.float32
    if request.param != "adapter":
        model = load_model(directory, dtype, "cpu", quantize="nf4" if "nf4" in request.param else None)
        return prepack(model) if "prepacked" in request.param else model
    random_adapter(theirs, tmp_path / "adapter", ["q", "k", "v", "o", "gate", "up", "down"], r=4)
    return load_model(directory, dtype, "cpu", adapter=tmp_path / "adapter")


def test_how_weights_are_stored_is_part_of_the_arithmetic(save_mistral):
    """So that stored results of other kernels are not reused."""
    model = load_model(save_mistral()[0], torch.float32, "cpu")
    before = Scorer(model).arithmetic()
    assert Scorer(prepack(model)).arithmetic() == before | {"weights": ["prepacked"]} != before


@pytest.mark.parametrize("sizes", [SIZES, None], ids=["small", "default"])
def test_the_bits_of_a_request_are_its_own(sizes, model):
    """Alone, with any others, in any order, after any number of computed nodes."""
    scorer = Scorer(model, sizes)
    requests = draw_requests()
    together = scorer.score(requests)
    alone = [scorer.score([request])[0] for request in requests]
    assert together == alone
    draw = random.Random(1)
    for seed in range(3):
        indices = draw.sample(range(len(requests)), k=len(requests) // 2)
        others = draw_requests(seed + 5)
        mixed = [(requests[index], together[index]) for index in indices] + [(other, None) for other in others]
        draw.shuffle(mixed)
        results = scorer.score([one for one, _ in mixed])
        assert all(scored == known for scored, (_, known) in zip(results, mixed) if known)


def test_shared_beginnings_are_computed_once(save_mistral):
    directory, _ = save_mistral(vocab_size=VOCABULARY)
    requests = draw_requests()
    trie = build_trie(requests)
    inputs = [(*context, *continuation)[:-1] for context, continuation in requests]
    assert len(trie.tokens) == len({ids[:length] for ids in inputs for length in range(1, len(ids) + 1)})
    assert sum(map(len, inputs)) > 2.5 * len(trie.tokens)
    model = load_model(directory, torch.float32, "cpu")
    lengths = []
    model.register_forward_pre_hook(lambda module, arguments: lengths.append(len(arguments[0])))
    finished = [index for index, _ in Scorer(model, SIZES).stream(requests)]
    assert sorted(finished) == list(range(len(requests)))
    assert lengths == [SIZES.nodes] * -(-len(trie.tokens) // SIZES.nodes)


def test_tiles_hold_every_node_once_with_its_ancestors():
    """By the slots that a plain reading of the trie gives."""
    trie = build_trie(draw_requests(3))
    for start, chunk in plan_chunks(trie.depths, SIZES.nodes, SIZES.tiles):
        count = min(SIZES.nodes, len(trie.depths) - start)
        assert sorted(chunk.rows[chunk.rows >= 0].tolist()) == list(range(count))
        for rows, path in zip(chunk.rows, chunk.paths, strict=True):
            nodes = rows[rows >= 0]
            assert chunk.depths[nodes].tolist() == list(range(len(path) - len(nodes), len(path)))
            assert path[chunk.depths[nodes]].tolist() == (chunk.slot + nodes).tolist()
            # a parent is the last node before of one depth less
            for depth, (parent, slot) in enumerate(itertools.pairwise(path)):
                if slot >= chunk.slot:
                    before = range(slot - chunk.slot)
                    above = [chunk.slot + node for node in before if chunk.depths[node] == depth]
                    assert parent == (above[-1] if above else depth)


def test_log_probabilities_of_tokens(save_mistral):
    directory, theirs = save_mistral(vocab_size=VOCABULARY, sliding_window=16)
    ids = random.Random(0).choices(range(VOCABULARY), k=90)
    with torch.no_grad():
        logps = theirs.double()(torch.tensor([ids])).logits[0].log_softmax(1)
    found = Scorer(load_model(directory, torch.float64, "cpu"), SIZES).token_logps(ids)
    reference = logps[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert torch.allclose(torch.from_numpy(found), reference, atol=1e-6)


def test_empty_requests(save_mistral):
    directory, _ = save_mistral(vocab_size=VOCABULARY)
    scorer = Scorer(load_model(directory, torch.float32, "cpu"))
    assert scorer.score([]) == []
    for request in (([], [1]), ([1], [])):
        with pytest.raises(ValueError, match="at least a token each"):
            scorer.score([request])
