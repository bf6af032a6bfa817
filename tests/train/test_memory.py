"""CUDA out of memory ends a run in one line, with what to lower."""

import pytest
import torch

from minorca import UserError, cli
from minorca.train import __main__ as train_command
from minorca.train import run, step
from tests.helpers import save_tokenizer, training

# as torch 2.13 writes it
MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 5.06 MiB is "
    "free. Including non-PyTorch memory, this process has 79.10 GiB memory in use. Of the allocated memory 70.00 GiB "
    "is allocated by PyTorch, and 1.00 GiB is reserved by PyTorch but unallocated. If reserved but unallocated memory "
    "is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)


def raise_out_of_memory(*_, **__):
    raise torch.OutOfMemoryError(MESSAGE)


@pytest.mark.parametrize(
    "settings, advice",
    [
        (
            {"train.micro_batch_tokens": 512},
            [
                "set parallel.activation_checkpointing to selective, with which the same run resumes",
                "lower train.micro_batch_tokens from 512 to 256, in a run with another train.output",
            ],
        ),
        (
            {"train.micro_batch_tokens": 512, "parallel.activation_checkpointing": "selective"},
            ["set parallel.activation_checkpointing to full", "lower train.micro_batch_tokens from 512 to 256"],
        ),
        (
            {"train.micro_batch_tokens": 512, "parallel.activation_checkpointing": "full"},
            ["set parallel.activation_checkpointing to offload", "lower train.micro_batch_tokens from 512 to 256"],
        ),
        (
            {"train.micro_batch_tokens": 512, "parallel.activation_checkpointing": "offload"},
            ["To need less, lower train.micro_batch_tokens from 512 to 256"],
        ),
        # not under the longest row
        (
            {"train.micro_batch_tokens": 256, "data.seq_len": 200},
            [
                "lower train.micro_batch_tokens from 256 to 200, and set train.batch_tokens, 512, to a multiple of it",
            ],
        ),
        (
            {},
            ["lower data.seq_len from 128 to 64, and train.micro_batch_tokens too, in a run with another train.output"],
        ),
        (
            {"train.micro_batch_tokens": 512, "data.packing": "false"},
            ["lower data.seq_len from 128 to 64, in a run with another train.output"],
        ),
        (
            {"train.full": "true", "lora.rank": 16},
            ["run on more GPUs", "set optim.name to adamw_8bit, or lower data.seq_len", "which model.path starts from"],
        ),
    ],
)
def test_a_step_that_needs_too_much_says_what_to_lower(settings, advice, workplace, monkeypatch, capsys):
    monkeypatch.setattr(step, "batch_sums", raise_out_of_memory)
    with pytest.raises(SystemExit) as ended:
        cli.run(train_command.main, workplace(**settings))
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "minorca" in line]
    assert "CUDA out of memory. Tried to allocate 2.00 GiB." in line and "79.10 GiB memory in use. To need less" in line
    assert all(part in line for part in advice) and "fragmentation" not in line


def test_weights_that_do_not_fit(workplace, save_mistral, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "build", raise_out_of_memory)
    message = "the model does not fit: CUDA out of memory. Tried .* To load it, run on several GPUs with torchrun and"
    with pytest.raises(UserError, match=f"{message}.*, or set model.quantize to nf4$"):
        train_command.main(workplace())
    # rows of whole blocks of 64
    wide, _ = save_mistral(vocab_size=260, intermediate_size=128)
    save_tokenizer(wide)
    with pytest.raises(UserError, match=f"{message}.*, with parallel.shard fsdp$"):
        train_command.main(workplace(**{"model.path": wide, "model.quantize": "nf4"}))
    with pytest.raises(UserError, match="To load it, set parallel.cpu_offload, .*, or use more GPUs"):
        train_command.main(workplace(**{"train.full": "true", "lora.rank": 16}))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_all_ranks_end_with_the_one_whose_memory_does_not_suffice(workplace):
    process = training(workplace(), ranks=2, faulty=("out of memory", 1))
    _, err = process.communicate(timeout=60)
    assert err.count("minorca: ") == 1 and "minorca: error: CUDA out of memory" in err, err
    assert "or set parallel.shard to fsdp, with which the same run resumes" in err
