"""What a run starts from, read and checked before memory is taken: the base model's files, the rows, and their
identity.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from minorca.config import Config
from minorca.data.new_tokens import new_ids, training_tokenizer
from minorca.data.packing import BatchSchedule
from minorca.data.portable_files import adapter_files, portable_files
from minorca.data.prepare import prepare_store
from minorca.data.store import TokenStore
from minorca.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from minorca.errors import UserError
from minorca.export.huggingface import config_file
from minorca.files.adapters import other_base, read_adapter_settings
from minorca.files.weights import ModelFiles, open_model
from minorca.model.architecture import Architecture, model_directory, read_architecture
from minorca.model.layout import MATRICES
from minorca.model.quantization import Quantization, parse_quantization
from minorca.train import checkpoint
from minorca.train.ranks import World

log = logging.getLogger(__name__)

# settings that may differ between ranks, where the content of what they name does not
_PLACES = ("model.path", "data.train", "data.eval", "data.store", "lora.init", "dpo.reference", "train.output")
_PLACES += ("eval.include_path",)
# what the ranks must have read alike: in words, and the keys of the identity that say so
_CONTENTS = {
    "the base model": ("the base's",),
    "the initial adapter": ("the initial",),
    "the reference": ("the reference",),
    "the held-out rows": ("the held-out",),
    "the rows": ("the rows'", "data.train's"),
}


@dataclass(frozen=True)
class Inputs:
    """The base model's files, the rows to train on, those held out, and what the run's numbers follow from.

    Attributes:
        tok: the tokenizer of the rows.
        files: what lies beside what was trained: the tokenizer and the template, and of all weights config.json.
    """

    base: ModelFiles
    store: TokenStore
    held_out: TokenStore | None
    identity: dict
    tok: Tokenizer
    files: dict[str, bytes]

    def schedule(self, config: Config) -> BatchSchedule:
        """Which rows every step has."""
        train, data = config.train, config.data
        sections = zip(self.store.source_ranges, data.sources(data.train))
        sources = [(first, stop, source.weight) for (first, stop), source in sections]
        micro_batches = train.batch_tokens // train.micro_batch_tokens
        return BatchSchedule(
            self.store.lengths, train.micro_batch_tokens, micro_batches, data.packing, train.seed, sources
        )


def read_inputs(config: Config) -> Inputs:
    """Opens the base model's files and renders the rows.

    Raises:
        UserError: what is wrong with which file.
    """
    base = open_model(config.model.path, parse_quantization(config.model.quantize, config.model.double_quant))
    check_unquantized(config, base.quantization, base.directory)
    check_length(config.data.seq_len, base.arch)
    for directory in config.adapters.values():
        # Before the rows are rendered, which may take minutes.
        read_adapter_settings(directory)
        if other := other_base(directory, base.quantization):
            log.warning("%s: it %s", directory, other)
    tok, template = read_tokenizer(config)
    base = with_vocabulary(base, tok, config)
    store, held_out = read_data(config, tok, template)
    identity = checkpoint.identity(config, base.arch, base.paths, store, held_out)
    if config.train.full:
        dtype = getattr(torch, config.model.dtype)
        files = portable_files(tok, template, base.directory) | {"config.json": config_file(base, dtype)}
    else:
        files = adapter_files(tok, template, base.quantization)
    return Inputs(base, store, held_out, identity, tok, files)


def check_unquantized(config: Config, stored: Quantization | None, directory: Path) -> None:
    """Raises UserError: all weights are to be trained of a model that is stored in 4 bits."""
    if config.train.full and stored:
        message = f"the model is stored in {stored}, and train.full trains weights in fp32"
        raise UserError(f"{message}; give the unquantized model, or train adapters", path=directory)


def check_length(seq_len: int, arch: Architecture) -> None:
    """Raises UserError: the model has fewer positions."""
    positions = arch.max_positions
    if positions and seq_len > positions:
        message = f"is {seq_len}; the model has {positions} positions, so set it to {positions} or less"
        raise UserError(message, field="data.seq_len")


def read_tokenizer(config: Config) -> tuple[Tokenizer, str]:
    """The model's tokenizer with the run's new tokens, and the resolved name of the template that writes the rows."""
    directory = model_directory(config.model.path)
    tok, template = training_tokenizer(config)
    rows = read_architecture(directory).vocab_size
    # of the tokens that are not new
    check_vocabulary(load_tokenizer(directory) if tok.new_tokens else tok, rows, directory)
    return tok, template


def with_vocabulary(base: ModelFiles, tok: Tokenizer, config: Config) -> ModelFiles:
    """The base model with rows for the run's new tokens, and with a head of its own where PEFT would train one.

    Raises:
        UserError: settings that give the rows of one matrix two ways to be trained.
    """
    lora = config.lora
    whole = set(lora.modules_to_save)
    trained = whole | {matrix for matrix in MATRICES if matrix in lora.targets}
    if tok.new_tokens:
        if adapted := trained - whole:
            message = f"has {min(adapted)}, and the rows of the new tokens {', '.join(tok.new_tokens)} are trained"
            raise UserError(f"{message}; leave it out, or set it in lora.modules_to_save", field="lora.targets")
        if base.arch.tied and len(whole) == 1:
            message = "names one matrix of a model that ties embedding and head, and new tokens have rows in both"
            raise UserError(f"{message}; set it to [embed, head] or leave it empty", field="lora.modules_to_save")
        # control tokens without a row get one too
        ids = new_ids(tok)
        base = base.with_new_ids(range(min(ids.start, base.arch.vocab_size), ids.stop))
        named = ", ".join(f"{token} {i}" for token, i in zip(tok.new_tokens, ids))
        log.info("new tokens: %s; their rows of the embedding and head are trained", named)
    if base.arch.tied and trained:
        log.info(
            "the model ties embedding and head; as in PEFT, they become two matrices, trained: %s", sorted(trained)
        )
        base = base.untied()
    return base


def read_data(config: Config, tok: Tokenizer, template: str) -> tuple[TokenStore, TokenStore | None]:
    """The rows to train on and those held out, rendered; logs what became of every row."""
    data = config.data
    log.info("template: %s", template)
    store = prepare_store(data.sources(data.train), tok, template, data)
    store.report()
    _check_pairs(store, config.train.objective)
    if isinstance(data.eval, float):
        return _hold_out(store, data.eval, config.train.seed)
    held_out = prepare_store(data.sources(data.eval), tok, template, data) if data.eval else None
    if held_out:
        held_out.report()
        _check_pairs(held_out, config.train.objective)
    return store, held_out


def _check_pairs(store: TokenStore, objective: str) -> None:
    """Raises UserError: an objective compares answers, and a row has none to compare."""
    if objective not in ("sft", "kto") and not store.pair_counts.all():
        place = store.locate(int(np.flatnonzero(store.pair_counts == 0)[0]))
        message = f"has one answer with a label, and train.objective {objective} compares two"
        raise UserError(f"{message}; set train.objective to kto, or leave such rows out", path=place)


def _hold_out(store: TokenStore, fraction: float, seed: int) -> tuple[TokenStore, TokenStore]:
    order = np.random.default_rng(seed).permutation(len(store))
    count = round(len(store) * fraction)
    if not 0 < count < len(store):
        raise UserError(
            f"is {fraction}: {count} of {len(store)} rows would be held out; give a path or another fraction",
            field="data.eval",
        )
    log.info("%d of these rows are held out, %d are trained on", count, len(store) - count)
    return store.select(np.sort(order[count:])), store.select(np.sort(order[:count]))


def check_ranks_agree(config: Config, identity: dict, resumed: int, world: World) -> None:
    """Raises UserError where the ranks were started with different settings, or read different files."""
    values = {key: value for key, value in config.flat().items() if key not in _PLACES}
    for name, beginnings in _CONTENTS.items():
        values[name] = [item for item in identity.items() if item[0].startswith(beginnings)]
    values["the step of the newest checkpoint"] = resumed
    if differing := world.keys_that_differ(values):
        raise UserError(
            f"the ranks differ in {', '.join(differing)}; start all with the same settings on the same files, and one "
            "output that they share"
        )
