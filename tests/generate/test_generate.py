"""Generation against transformers', token for token; what the command prints."""

import io
import json
import os
import subprocess
import sys

import pytest
import torch

from minorca import UserError, cli, load_model
from minorca.generate import __main__ as command
from minorca.generate import generate
from tests.helpers import ROOT, random_adapter, save_tokenizer

PROMPTS = [
    torch.randint(3, 128, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 31, 32, 33, 70)
]


def greedy_of_transformers(model, prompt, new):
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **options)[
        0, len(prompt) :
    ].tolist()


@pytest.mark.parametrize("window", [None, 32])
def test_greedy_equals_transformers(window, save_mistral):
    """200 new tokens, past 3 windows, from prompts around the window's length: alone and all together."""
    directory, theirs = save_mistral(sliding_window=window, num_hidden_layers=3, initializer_range=0.2)
    ours = load_model(directory, torch.float32, "cpu")
    expected = [greedy_of_transformers(theirs, prompt, 200) for prompt in PROMPTS]
    assert generate(ours, PROMPTS, max_new_tokens=200) == expected
    assert generate(ours, PROMPTS[3:4], max_new_tokens=200) == expected[3:4]
    assert len({tuple(ids) for ids in expected}) == len(PROMPTS) and len(set(expected[0])) > 5


def test_greedy_equals_the_cacheless_forward(save_mistral):
    directory, _ = save_mistral(sliding_window=16)
    model = load_model(directory, torch.float32, "cpu")
    ids = list(PROMPTS[0])
    for token in generate(model, [ids], max_new_tokens=60)[0]:
        assert token == model(torch.tensor(ids)).argmax(-1)[-1].item()
        ids.append(token)


def test_an_adapter_needs_no_merging(save_mistral, tmp_path):
    directory, base = save_mistral()
    theirs = random_adapter(base, tmp_path / "adapter", ("q", "v", "down"))
    ours = load_model(directory, torch.float32, "cpu", adapter=tmp_path / "adapter")
    assert generate(ours, PROMPTS[:1], 50) == [greedy_of_transformers(theirs, PROMPTS[0], 50)]


def test_stop_ids_end_a_sequence_and_stay(save_mistral):
    model = load_model(save_mistral()[0], torch.float32, "cpu")
    whole = generate(model, PROMPTS, 40)
    stop = whole[0][7]
    for stopped, ids in zip(generate(model, PROMPTS, 40, stop_ids={stop}), whole):
        end = ids.index(stop) + 1 if stop in ids else len(ids)
        assert stopped == ids[:end]


def test_a_seed_repeats(save_mistral):
    model = load_model(save_mistral()[0], torch.float32, "cpu")
    one, again, other = (generate(model, PROMPTS, 20, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert one == again != other


@pytest.fixture
def talker(save_mistral):
    """A model that repeats «é€😀», whose characters are 2, 3 and 4 tokens each."""
    directory, model = save_mistral(
        vocab_size=260, hidden_size=512, num_attention_heads=4, num_hidden_layers=1, rms_norm_eps=1e-6
    )
    save_tokenizer(directory)
    from minorca import load_tokenizer

    tok = load_tokenizer(directory)
    cycle = tok.encode("é€😀")
    # A bigram table: no attention, no MLP, one direction a token.
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(260, 512))
        model.lm_head.weight.zero_()
        for here, following in zip(cycle, cycle[1:] + cycle[:1]):
            model.lm_head.weight[following, here] = 1
        model.lm_head.weight[cycle[0], tok.encode("\n")[0]] = 1
    model.save_pretrained(directory)
    return directory, tok


def run(capsys, *argv):
    cli.run(command.main, [str(word) for word in argv])
    return capsys.readouterr().out


def test_the_command_prints_text_or_json(talker, capsys, monkeypatch):
    directory, _ = talker
    assert run(capsys, "--model", directory, "--prompt", "hi", "--max-new-tokens", 9) == "é€😀\n"
    answer = json.loads(run(capsys, "--model", directory, "--prompt", "\n", "--raw", "--max-new-tokens", 9, "--json"))
    assert answer.pop("tokens_per_second") > 0
    assert answer == {"text": "é€😀", "tokens": 9, "prompt_tokens": 1, "finish_reason": "length"}
    raw = ("--model", directory, "--prompt", "hi<|im_end|>", "--raw", "--max-new-tokens", 1, "--json")
    assert json.loads(run(capsys, *raw))["prompt_tokens"] == 3
    assert json.loads(run(capsys, *raw, "--no-parse-control-tokens"))["prompt_tokens"] == len("hi<|im_end|>")
    with pytest.raises(UserError, match="--no-parse-control-tokens needs --raw"):
        command.main(["--model", str(directory), "--prompt", "hi", "--no-parse-control-tokens"])
    said = iter(["hello", "again"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said, None) or (_ for _ in ()).throw(EOFError))
    assert run(capsys, "--model", directory, "--chat", "--max-new-tokens", 9).count("é€😀\n") == 2


def test_a_prompt_comes_from_a_file_or_standard_input(talker, tmp_path, capsys, monkeypatch):
    """As if it stood on the command line, without an editor's newline and byte order mark."""
    directory, tok = talker
    more = ("--max-new-tokens", 1, "--json")
    expected = json.loads(run(capsys, "--model", directory, "--prompt", "Hi,\nyou é\n", *more))["prompt_tokens"]
    file = tmp_path / "prompt.txt"

    def prompt_tokens(content: bytes, *options) -> int:
        file.write_bytes(content)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        return json.loads(run(capsys, "--model", directory, *options, *more))["prompt_tokens"]

    for options in (("--prompt-file", file), ("--prompt-file", "-"), ("--prompt", "-")):
        text = "Hi,\nyou é\n"
        for content in (f"{text}\n", f"{text}\r\n", f"\ufeff{text}\n"):
            assert prompt_tokens(content.encode(), *options) == expected
        assert prompt_tokens(text.encode(), *options) == expected - 1
        assert prompt_tokens(f"{text}\n".encode(), *options, "--raw") == len(tok.encode_rendered(f"{text}\n"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    with pytest.raises(UserError, match="standard input: is not valid UTF-8 at byte 0"):
        command.main(["--model", str(directory), "--prompt", "-"])


@pytest.mark.parametrize("options", [("--prompt", "hi"), ("--prompt", "hi", "--json"), ("--chat",)])
def test_a_full_disk_ends_in_one_line(talker, options):
    """Of what is printed to it; beside the line on loading."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    words = ("-m", "minorca.generate", "--model", talker[0], "--max-new-tokens", 20, *options)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            input="hi\nagain\n",
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )
    *_, last = lines = done.stderr.splitlines()
    assert done.returncode == 2 and len([line for line in lines if "GB/s" not in line]) == 1, done.stderr
    assert last == "minorca: error: standard output cannot be written (No space left on device)"
