"""The two models that are compared: a directory each, of a model or of an adapter.

Axes: T tokens, M scored tokens, C those of a chunk, H hidden size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minorca.compare.prompts import Rendered
from minorca.data.chat_template import resolve_template
from minorca.data.portable_files import load_chat
from minorca.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from minorca.errors import UserError
from minorca.files.adapters import AdapterConfig, is_adapter
from minorca.files.mistral_lora import is_mistral_lora
from minorca.files.safe_io import user_path
from minorca.files.vocabulary import adapted_architecture, vocabulary_updates
from minorca.generate.batch import MAX_SLOTS
from minorca.generate.engine import Engine
from minorca.generate.request import Request
from minorca.model.architecture import Architecture, model_directory, read_architecture
from minorca.model.build import load_adapters, load_model, prepack
from minorca.model.lora import AdapterChoice
from minorca.model.network import Mistral
from minorca.progress import progress_bar
from minorca_kernels import FrozenWeight

# Scored tokens whose logits exist at once, in fp64: of 32,768 ids, 34 MB a model.
CHUNK_ROWS = 128


@dataclass(frozen=True)
class Side:
    """One of the two.

    Attributes:
        name: A or B.
        path: its directory, as it was given.
        model: the model's directory.
        adapter: the adapter's, or None.
        template: the resolved name.
    """

    name: str
    path: str
    model: Path
    adapter: Path | None
    arch: Architecture
    tok: Tokenizer
    template: str

    def described(self) -> dict[str, str | None]:
        adapter = None if self.adapter is None else str(self.adapter)
        return {"path": self.path, "model": str(self.model), "adapter": adapter, "template": self.template}


def open_side(name: str, path: str, model: str | None, template: str | None) -> Side:
    """Reads everything but the weights.

    Args:
        model: an adapter's base; None: what its adapter_config.json names.
        template: None: that of the adapter's training, or auto.

    Raises:
        UserError: what is wrong with which file.
    """
    directory = model_directory(path)
    adapter = directory if is_adapter(directory) else None
    base = user_path(path) if adapter is None else _base(adapter, model)
    tok, arch = load_tokenizer(base), read_architecture(base)
    check_vocabulary(tok, arch.vocab_size, base)
    arch = adapted_architecture(arch, adapter)
    tok, recorded = load_chat(tok, arch.vocab_size, adapter)
    return Side(name, path, base, adapter, arch, tok, resolve_template(tok, template or recorded or "auto"))


def _base(adapter: Path, model: str | None) -> Path:
    if model is not None:
        return user_path(model)
    if is_mistral_lora(adapter):
        raise UserError("does not name its base; give it with --model DIR", path=adapter)
    config = AdapterConfig(adapter)
    field = "base_model_name_or_path"
    named = config.values.get(field)
    if not isinstance(named, str) or not user_path(named).is_dir():
        config.refuse(
            field, "expected a directory that is here; give the adapter's base with --model DIR, or its hub id"
        )
    return model_directory(named)


def why_not_comparable(a: Side, b: Side, rendered: Sequence[tuple[Rendered, Rendered]]) -> str | None:
    """Why the models' distributions over the next token cannot be compared; None where they can."""
    if a.tok is not b.tok and not a.tok.has_ids_of(b.tok):
        return "the tokenizers differ: an id of A is another text in B"
    if a.arch.vocab_size != b.arch.vocab_size:
        return f"A has {a.arch.vocab_size} ids and B {b.arch.vocab_size}"
    if any(one != two for one, two in rendered):
        templates = f"A (template {a.template}) and B (template {b.template})"
        return f"rows become other ids for {templates}; --template may give both the same"
    return None


class FlatRows(NamedTuple):
    """Rows end to end, and what is scored of them.

    Attributes:
        tokens_T, cu_seqlens: a flat batch.
        positions_M: the token before each scored one, whose logits predict it.
        targets_M: the scored tokens.
        counts: of the rows' scored tokens.
    """

    tokens_T: Tensor
    cu_seqlens: Tensor
    positions_M: Tensor
    targets_M: Tensor
    counts: list[int]


def flatten(rows: Sequence[Rendered], device: torch.device) -> FlatRows:
    tokens_T = torch.tensor([i for row in rows for i in row.ids])
    # no row's first token is scored
    scored_M = torch.tensor([scored for row in rows for scored in row.scored]).nonzero()[:, 0]
    cu_seqlens = torch.tensor([0, *(len(row.ids) for row in rows)]).cumsum(0).to(torch.int32)
    targets_M, counts = tokens_T[scored_M], [sum(row.scored) for row in rows]
    return FlatRows(tokens_T.to(device), cu_seqlens, (scored_M - 1).to(device), targets_M.to(device), counts)


class Runner:
    """A side with its model on a device.

    Attributes:
        model: which the other side may share.
        adapters, adapter: those beside the model, and the name of this side's, or None.
    """

    def __init__(self, side: Side, model: Mistral, adapters: AdapterChoice):
        self.side = side
        self.model = model
        self.adapters = adapters
        self.adapter = side.name if side.adapter else None

    @property
    def device(self) -> torch.device:
        return self.model.embedding.weight.device

    def log_probabilities(self, rows: FlatRows) -> Iterator[tuple[Tensor, Tensor]]:
        """For each chunk of scored tokens, their ids [C], and of every id its log-probability [C, V] in fp64."""

        def head(hidden_TH: Tensor, weight: FrozenWeight) -> tuple[Tensor, FrozenWeight]:
            return hidden_TH[rows.positions_M], weight

        index = torch.tensor([self.adapters.index(self.adapter)], device=self.device)
        self.adapters.choose(index, self.adapter is not None)
        hidden_MH, weight = self.model(rows.tokens_T, rows.cu_seqlens, head=head)
        for hidden_CH, targets_C in zip(hidden_MH.split(CHUNK_ROWS), rows.targets_M.split(CHUNK_ROWS)):
            yield targets_C, weight.linear(hidden_CH).double().log_softmax(-1)

    def answer(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        """The ids of the greedy answers, each with the token that ended it, if one did."""
        if not prompts:
            return []
        stop_ids = self.side.tok.stop_ids
        requests = [Request(prompt, max_new_tokens, stop_ids=stop_ids, adapter=self.adapter) for prompt in prompts]
        longest = max(map(len, prompts)) + max_new_tokens
        engine = Engine(self.model, min(len(prompts), MAX_SLOTS), longest, self.adapters)
        for request in requests:
            engine.add(request)
        ids: dict[Request, list[int]] = {request: [] for request in requests}
        with progress_bar(f"answers of {self.side.name}", len(prompts), "answers") as bar:
            while engine.busy:
                for token in engine.step():
                    ids[token.request].append(token.id)
                    if token.finish_reason:
                        bar.update()
        return list(ids.values())


def load(sides: Sequence[Side], dtype: torch.dtype, quantize: str | None, double_quant: bool) -> list[Runner]:
    """Loads the models: one for both sides where they have the same base and their adapters leave its vocabulary as it
    is, else one for each.

    Raises:
        UserError: what is wrong with which file.
    """
    is_shared = len({side.model.resolve() for side in sides}) == 1
    if is_shared and not any(side.adapter and vocabulary_updates(side.adapter) for side in sides):
        return _runners(sides, load_model(sides[0].model, dtype, None, None, quantize, double_quant), alone=False)
    runners = []
    for side in sides:
        model = load_model(side.model, dtype, None, side.adapter, quantize, double_quant, vocabulary_only=True)
        runners += _runners([side], model, alone=True)
    return runners


def _runners(sides: Sequence[Side], model: Mistral, alone: bool) -> list[Runner]:
    adapters = load_adapters(model, {side.name: side.adapter for side in sides if side.adapter}, alone)
    prepack(model)
    return [Runner(side, model, adapters) for side in sides]
