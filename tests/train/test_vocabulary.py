"""Trained rows of new tokens, whole matrices and low-rank updates of the embedding and head, compared with PEFT's."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from minorca import UserError, load_model, load_tokenizer, render_chat
from minorca.data.packing import plan_epoch
from minorca.export.__main__ import export
from minorca.generate import __main__ as generate_command
from minorca.model.lora import adapter_parameters
from minorca.serve import __main__ as serve_command
from minorca.train import __main__ as train_command
from minorca.train import build
from minorca.train.inputs import read_data, read_tokenizer
from minorca.train.optim import learning_rate
from tests.helpers import (
    ROOT,
    Workplace,
    assert_same_bits,
    assert_same_run,
    lines_of,
    relative_error,
    save_tokenizer,
    torchrun,
)
from tests.train.test_train import config_of

# of a tokenizer with 258 ids and a model with 260: the last has no row yet
NEW = ["<|a|>", "<|b|>", "<|c|>"]
ROLES = (("system", "system_prompt"), ("user", "question"), ("assistant", "response"))
KINDS = {
    "rows": {"train.new_tokens": NEW},
    "matrices": {"train.new_tokens": NEW, "lora.modules_to_save": "[embed, head]"},
    "matrix and rows": {"train.new_tokens": NEW, "lora.modules_to_save": "[head]"},
    "adapters": {"lora.targets": "[q, down, embed, head]", "lora.rslora": True},
}
CASES = [(tied, kind) for tied in (True, False) for kind in KINDS if not (tied and kind == "matrix and rows")]


@pytest.fixture
def place(save_mistral, tmp_path):
    """place(tied): a workplace whose rows are texts with the new tokens' strings."""

    def make(tied: bool, **settings):
        directory, model = save_mistral(vocab_size=260, tie_word_embeddings=tied, initializer_range=0.08)
        save_tokenizer(directory)
        texts = [f"<|a|>{n} times {n}<|b|>is {n * n}<|c|>" for n in range(40)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        work = Workplace(tmp_path, directory, model)
        sizes = {"data.seq_len": 64, "train.micro_batch_tokens": 64, "train.batch_tokens": 256, "train.steps": 10}
        fixed = {"data.format": "text", "data.train_on": "all"} | sizes | settings
        return work, lambda output="run", **more: work(output, **{k: as_text(v) for k, v in (fixed | more).items()})

    return make


def as_text(value):
    return json.dumps(value) if isinstance(value, list) else value


def resized(model, rows: int, size: int):
    """transformers' own model with more rows, which start as the mean of the first `rows`."""
    matrices = [model.get_input_embeddings(), model.get_output_embeddings()]
    means = [matrix.weight[:rows].mean(0) for matrix in matrices]
    if size > model.config.vocab_size:
        model.resize_token_embeddings(size, mean_resizing=False)
        with torch.no_grad():
            for matrix, mean in zip((model.get_input_embeddings(), model.get_output_embeddings()), means):
                matrix.weight[rows:] = mean
    return model


@pytest.fixture
def started(monkeypatch):
    """What is trained, by name, as the next run starts with it."""
    values = {}
    init = build.init_adapters

    def save_start(model, seed):
        init(model, seed)
        values.update({name: p.detach().clone() for name, p in adapter_parameters(model).items()})

    monkeypatch.setattr(build, "init_adapters", save_start)
    return values


def follow(theirs, config, started: dict, losses: list[float], tolerance: float = 1e-4) -> dict:
    """Trains PEFT's model from the same start on the same rows, one by one; each loss must be ours. Returns what it
    trains, by our names.
    """
    trained = {
        name.replace(".default", "").replace("modules_to_save.", ""): parameter
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    assert trained.keys() == started.keys()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(started[name])
    optimizer = torch.optim.AdamW(trained.values(), betas=config.optim.betas, weight_decay=0)
    store, _ = read_data(config, *read_tokenizer(config))
    train = config.train
    micro_batches = train.batch_tokens // train.micro_batch_tokens
    epochs = (plan_epoch(store.lengths, train.micro_batch_tokens, micro_batches, True, 0, n) for n in range(9))
    for n, (step, ours) in enumerate(zip((step for steps in epochs for step in steps), losses), 1):
        total = 0.0
        rows = [store.row(row) for micro_batch in step for row in micro_batch]
        for ids, mask in rows:
            labels = torch.where(torch.tensor(mask), torch.tensor(ids).long(), -100)[1:]
            logits = theirs(torch.tensor(ids).long()[None]).logits[0, :-1]
            loss = F.cross_entropy(logits, labels, reduction="sum") / sum(mask.sum() for _, mask in rows)
            loss.backward()
            total += loss.item()
        assert total == pytest.approx(ours, rel=tolerance), f"step {n}"
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(n, len(losses), config.optim)
        optimizer.step()
        optimizer.zero_grad()
    return trained


@pytest.mark.parametrize("tied, kind", CASES)
def test_ten_steps_follow_pefts(tied, kind, place, tmp_path, started):
    """From the same start, every loss, all that is trained, and the logits of what is saved."""
    work, options = place(tied, **KINDS[kind])
    train_command.main(options())
    adapter = tmp_path / "run" / "adapter"
    size = 261 if "train.new_tokens" in KINDS[kind] else 260
    base = resized(AutoModelForCausalLM.from_pretrained(work.model_path), 258, size)
    theirs = PeftModel.from_pretrained(base, adapter, is_trainable=True).train()
    ids = torch.tensor(load_tokenizer(adapter).encode_template("<|a|>7 times 7<|b|>"))
    with torch.no_grad():
        model = load_model(work.model_path, torch.float32, "cpu", adapter=adapter)
        assert relative_error(model(ids), theirs(ids[None]).logits[0]) <= 1e-5
    trained = follow(theirs, config_of(options()), started, [line["loss"] for line in lines_of(tmp_path / "run")])
    saved = load_file(adapter / "adapter_model.safetensors")
    assert max(relative_error(saved[name], parameter) for name, parameter in trained.items()) < 2e-3


def test_a_run_with_new_tokens_from_start_to_text(place, tmp_path, caplog, capsys):
    """It resumes exactly, keeps the best, says how to serve it, generates with its tokens, and merges; no other row
    changes.
    """
    caplog.set_level("INFO")
    evaluated = {"data.eval": 0.2, "train.eval_every": 2, "train.checkpoint_every": 4, "train.keep_best": True}
    work, options = place(False, **KINDS["rows"], **evaluated, **{"train.steps": 6, "lora.targets": "[v]"})
    train_command.main(options("whole"))
    train_command.main(options())
    shutil.rmtree(tmp_path / "run" / "adapter")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    train_command.main(options())
    assert_same_bits(tmp_path / "whole", tmp_path / "run")
    adapter, merged = tmp_path / "run" / "adapter", tmp_path / "run" / "merged"
    command = f"python -m minorca.export --model {work.model_path} --adapter {adapter} --output {merged}"
    said = "vLLM and minorca.serve load no adapter that changes embedding or head; merge it for them"
    assert f"{said}: {command}" in caplog.text
    train_command.main(options("next", **{"lora.init": adapter}))
    first, last = (json.loads((tmp_path / run / "adapter" / "best.json").read_text()) for run in ("run", "next"))
    assert lines_of(tmp_path / "next")[0]["eval_loss"] == first["eval_loss"] >= last["eval_loss"]

    export(work.model_path, adapter, merged)
    before, after = (load_file(path / "model.safetensors") for path in (work.model_path, merged))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(after[name][:258], before[name][:258]) and not torch.equal(
            after[name][258:260], before[name][258:]
        )
    texts = []
    for model in (["--model", str(merged)], ["--model", str(work.model_path), "--adapter", str(adapter)]):
        generate_command.main([*model, "--prompt", "<|a|>3 times 3<|b|>", "--raw", "--json", "--max-new-tokens", "8"])
        texts.append(json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"])
    assert texts[0] == texts[1]
    # a checkpoint has the tokenizer, too
    assert load_tokenizer(tmp_path / "run" / "checkpoints" / "step-00000006").encode_template("<|c|>") == [260]
    with pytest.raises(UserError, match="trains rows or all of embed and head"):
        serve_command.main(["--model", str(work.model_path), "--adapter", str(adapter), "--port", "0"])


@pytest.mark.parametrize(
    "tied, settings, message",
    [
        (True, {"train.new_tokens": NEW, "lora.modules_to_save": "[head]"}, "modules_to_save names one matrix .* both"),
        (True, {"train.new_tokens": NEW, "lora.targets": "[q, head]"}, "train.new_tokens needs trained rows of head"),
        (True, {"lora.targets": "[q, head]", "lora.modules_to_save": "[head]"}, "trained whole or by an adapter"),
        (True, {"lora.modules_to_save": "[head, head]"}, "modules_to_save is .*; expected each once"),
        (
            True,
            {"train.new_tokens": ["<|im_end|>"]},
            "has '<.im_end.>', which is a token already, id 257; leave it out",
        ),
    ],
)
def test_what_contradicts_itself(tied, settings, message, place, tmp_path):
    with pytest.raises(UserError, match=message):
        train_command.main(place(tied)[1](**settings))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["matrix and rows", "adapters"])
def test_ranks_and_shards_do_not_matter(kind, place, tmp_path):
    """Two ranks, the model whole or sharded, follow one rank."""
    _, options = place(False, **KINDS[kind], **{"train.batch_tokens": 1024, "data.eval": 0.1})
    torchrun(1, options("one"))
    for shard in ("none", "fsdp"):
        torchrun(2, options(shard, **{"parallel.shard": shard}))
        assert_same_run(tmp_path / "one", tmp_path / shard)


def test_new_tokens_of_a_run_that_trains_all_weights(place, tmp_path):
    settings = {"train.new_tokens": NEW, "train.full": True, "lora.rank": 16, "train.steps": 2}
    _, options = place(True, **settings)
    train_command.main(options())
    model = load_model(tmp_path / "run" / "model", torch.float32, "cpu")
    assert model.arch.vocab_size == 261 and model.arch.tied
    assert load_tokenizer(tmp_path / "run" / "model").encode_template("<|c|>") == [260]


@pytest.mark.slow
def test_a_real_model_learns_to_end_its_turn(smollm2, tmp_path, started):
    """SmolLM2 without ChatML's tokens, which the template adds: trained rows end all turns, as PEFT's do with the same
    recipe, and adapters alone end none.
    """
    base = tmp_path / "base"
    shutil.copytree(smollm2, base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (base / name).read_text().replace("<|im_start|>", "<|1|>").replace("<|im_end|>", "<|2|>")
        (base / name).write_text(text)
    (base / "chat_template.jinja").unlink()
    settings = {
        "model.dtype": "float32",
        "data.train": ROOT / "examples" / "data" / "train.jsonl",
        "data.template": "chatml",
        "data.seq_len": 100,
        "lora.rank": 8,
        "optim.lr": 0.004,
        "optim.schedule": "constant",
        "train.batch_tokens": 400,
        "train.micro_batch_tokens": 400,
        "train.steps": 12,
    }

    def options(model, output: str) -> list[str]:
        named = {"model.path": model, "train.output": tmp_path / output} | settings
        return [f"--{key}={value}" for key, value in named.items()]

    train_command.main(options(base, "rows"))
    adapter = tmp_path / "rows" / "adapter"
    tok = load_tokenizer(adapter)
    assert tok.control_ids["<|im_end|>"] == 49152 and 49152 in tok.stop_ids

    grown = resized(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), 49152, 49154)
    grown.save_pretrained(tmp_path / "grown")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(adapter / name, tmp_path / "grown")
    theirs = PeftModel.from_pretrained(grown, adapter, is_trainable=True).train()
    losses = [line["loss"] for line in lines_of(tmp_path / "rows")]
    follow(theirs, config_of(options(base, "rows")), started, losses, tolerance=2e-3)
    train_command.main(options(tmp_path / "grown", "alone"))

    rows = [json.loads(line) for line in (ROOT / "examples" / "data" / "eval.jsonl").read_text().splitlines()]
    # by the shortest answers
    rows = sorted(rows, key=lambda row: len(row["response"]))[:20]
    conversations = [[{"role": role, "content": row[key]} for role, key in ROLES if row[key]] for row in rows]
    whole = [torch.tensor(render_chat(tok, messages, False)) for messages in conversations]

    def ends(logits_of) -> tuple[float, int]:
        """After the answers: the mean log-probability of the end of the turn, and how often it is the likeliest."""
        with torch.no_grad():
            logits = torch.stack([logits_of(ids[:-2])[-1] for ids in whole])
        return logits.log_softmax(-1)[:, 49152].mean().item(), int((logits.argmax(-1) == 49152).sum())

    ours = ends(load_model(base, torch.float32, "cpu", adapter=adapter))
    alone = ends(load_model(tmp_path / "grown", torch.float32, "cpu", adapter=tmp_path / "alone" / "adapter"))
    assert ours[0] > -0.1 and ours == (pytest.approx(ends(lambda ids: theirs(ids[None]).logits[0])[0], abs=0.02), 20)
    assert alone[0] < -8 and alone[1] == 0
    # the rest of the embedding
    export(base, adapter, tmp_path / "merged")
    name = "model.embed_tokens.weight"
    before, after = (load_file(path / "model.safetensors")[name] for path in (base, tmp_path / "merged"))
    assert torch.equal(after[:49152], before) and not torch.equal(after[49152], after[49153])
