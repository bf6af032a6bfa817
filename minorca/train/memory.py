"""What to do where a GPU's memory does not suffice."""

import torch

from minorca.config import Config, choices
from minorca.errors import UserError, memory_asked_for
from minorca.plan.advice import CHECKPOINTING


def out_of_memory(error: torch.OutOfMemoryError, config: Config, ranks: int) -> UserError:
    """The error in a line: what was asked for and what is in use, as torch says it, and which settings to lower."""
    remedies = []
    kinds = choices(CHECKPOINTING)
    for more in kinds[kinds.index(config.parallel.activation_checkpointing) + 1 :][:1]:
        remedies.append(f"set {CHECKPOINTING} to {more}, with which the same run resumes")
    if config.train.full:
        remedies.append("run on more GPUs, on which the same run resumes")
        if config.optim.name == "adamw":
            remedies.append("set optim.name to adamw_8bit")
    remedies.append(_shorter_batches(config))
    if ranks > 1 and not _sharded(config):
        remedies.append("set parallel.shard to fsdp, with which the same run resumes")
    return UserError(f"{memory_asked_for(error)} To need less, {', or '.join(remedies)}")


def weights_do_not_fit(error: torch.OutOfMemoryError, config: Config, ranks: int, quantized: bool) -> UserError:
    """The same for the weights alone. quantized: whether the projections are."""
    remedies = []
    if not _sharded(config):
        several = "run on several GPUs with torchrun and parallel.shard fsdp"
        remedies.append("set parallel.shard to fsdp" if ranks > 1 else several)
    if not config.parallel.cpu_offload:
        remedies.append("set parallel.cpu_offload, with parallel.shard fsdp")
    if not (quantized or config.train.full):
        remedies.append("set model.quantize to nf4")
    if _sharded(config):
        remedies.append("use more GPUs")
    return UserError(f"the model does not fit: {memory_asked_for(error)} To load it, {', or '.join(remedies)}")


def _sharded(config: Config) -> bool:
    return config.train.full or config.parallel.shard == "fsdp"


def _shorter_batches(config: Config) -> str:
    """Half of what a forward holds: of several rows in a micro-batch, or else of the longest row."""
    train, data = config.train, config.data
    size, longest = train.micro_batch_tokens, data.seq_len
    if not data.packing or size == longest:
        lower = longest // 2
        advice = f"lower data.seq_len from {longest} to {lower}"
        if size == longest:
            advice += ", and train.micro_batch_tokens too"
    else:
        lower = max(size // 2, longest)
        advice = f"lower train.micro_batch_tokens from {size} to {lower}"
    if train.batch_tokens % lower:
        advice += f", and set train.batch_tokens, {train.batch_tokens}, to a multiple of it"
    return (
        f"{advice}, in a run with another train.output, which {config.start_key} starts from a checkpoint of this one"
    )
