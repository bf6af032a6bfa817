"""What an adapter in PEFT's format makes of a model's embedding and head: more rows, other rows, whole other matrices,
or a low-rank update; and the model's architecture with it.

PEFT trains rows of a tied matrix for both of its uses; a matrix that it trains whole or by a low-rank update is one of
its own.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from minorca.errors import UserError
from minorca.files.adapters import AdapterConfig, adapter_file, open_tensors_of, read_adapter_settings, read_record
from minorca.files.hub import local_directory
from minorca.files.mistral_lora import is_mistral_lora
from minorca.files.safe_io import quote
from minorca.files.tensor_files import TensorFiles
from minorca.files.weights import ModelFiles
from minorca.model.architecture import Architecture
from minorca.model.layout import MATRICES, Matrix, matrix_module, matrix_peft_names


@dataclass(frozen=True)
class MatrixUpdate:
    """What an adapter makes of one matrix [V, H] of the vocabulary.

    Attributes:
        names: of its tensors in the adapter's file: `whole`, `rows`, and `A` and `B`, those that there are.
        ids: of its rows.
        scale: of B A.
    """

    matrix: Matrix
    files: TensorFiles
    names: dict[str, str]
    ids: list[int]
    scale: float

    def size(self) -> int | None:
        """The number of ids that it is for; None where it has rows of some alone."""
        for part, axis in (("whole", 0), ("A", 1) if self.matrix == "embed" else ("B", 0)):
            if part in self.names:
                # a tensor of fewer axes is refused below
                return (*self.files.shape(self.names[part]), 0, 0)[axis]
        return None

    def last_id(self) -> int:
        """The highest id that it has a row of; -1 if none."""
        return max([(self.size() or 0) - 1, *(self.ids if "rows" in self.names else [])])

    def check(self, rows: int, hidden_size: int) -> None:
        """Checks the shapes of its tensors. Raises UserError: as `TensorFiles.check`."""
        shapes = {"whole": (rows, hidden_size), "rows": (len(self.ids), hidden_size)}
        if "A" in self.names:
            rank = (*self.files.shape(self.names["A"]), 0)[0]
            sizes = (rows, hidden_size) if self.matrix == "embed" else (hidden_size, rows)
            shapes |= {"A": (rank, sizes[0]), "B": (sizes[1], rank)}
        self.files.check_shapes({self.names[part]: shapes[part] for part in self.names})

    def holds_the_same(self, other: "MatrixUpdate") -> bool:
        """Whether the other makes the same of another matrix with the same values."""
        same = (self.names.keys(), self.ids) == (other.names.keys(), other.ids) and "A" not in self.names
        return same and all(torch.equal(self._read(part), other._read(part)) for part in self.names)

    def apply(self, weight_VH: Tensor, rows: int) -> Tensor:
        """The matrix with so many rows, in weight's dtype; the arithmetic is fp32."""
        before_VH = self._read("whole") if "whole" in self.names else weight_VH
        updated_VH = torch.zeros(rows, before_VH.shape[1], device=weight_VH.device)
        updated_VH[: len(before_VH)] = before_VH
        if "rows" in self.names:
            updated_VH[torch.tensor(self.ids, device=weight_VH.device)] = self._read("rows").to(weight_VH.device)
        if "A" in self.names:
            delta = self._read("B") @ self._read("A")
            delta_VH = delta.t() if self.matrix == "embed" else delta
            updated_VH.add_(delta_VH.to(weight_VH.device), alpha=self.scale)
        return updated_VH.to(weight_VH.dtype)

    def _read(self, part: str) -> Tensor:
        return self.files.whole(self.names[part]).float()


def vocabulary_updates(adapter: str | Path) -> dict[Matrix, MatrixUpdate]:
    """What an adapter makes of each matrix that it changes.

    Raises:
        UserError: what is wrong with which file.
    """
    directory = local_directory(adapter)
    # mistral-finetune trains projections alone
    if is_mistral_lora(directory):
        return {}
    settings = read_adapter_settings(directory)
    files = open_tensors_of(directory)
    config = AdapterConfig(directory)
    ids = config.token_ids()
    said = (("modules_to_save", "whole", settings.modules_to_save), ("trainable_token_indices", "rows", tuple(ids)))
    for field, part, matrices in said:
        for name in (matrix_peft_names(matrix)[part] for matrix in matrices):
            # a tied head has the embedding's rows
            if name not in files.files and not (part == "rows" and "embed" in ids and "lm_head" in name):
                config.refuse(field, f"but {adapter_file(directory).name} lacks {name}; write the adapter again")
    updates = {}
    for matrix in MATRICES:
        names = {part: name for part, name in matrix_peft_names(matrix).items() if name in files.files}
        part = settings.part(0, matrix)
        if ("A" in names) != ("B" in names):
            raise UserError(f"has one of the tensors lora_A and lora_B of {matrix}; expected both", path=directory)
        if names:
            # a tied head has the embedding's
            of_rows = ids.get(matrix, ids.get("embed", []))
            updates[matrix] = MatrixUpdate(matrix, files, names, of_rows, part.scale if part else 1.0)
    return updates


def adapted_architecture(arch: Architecture, adapter: str | Path | None) -> Architecture:
    """A model's architecture with an adapter, which may add ids or give the model a head of its own.

    Raises:
        UserError: the adapter is of a model with another vocabulary.
    """
    return arch if adapter is None else _adapted(arch, local_directory(adapter), vocabulary_updates(adapter))


def adapt(source: ModelFiles, adapter: str | Path) -> tuple[ModelFiles, dict[str, MatrixUpdate]]:
    """A model's files with the architecture that it has with an adapter, and what becomes of which module."""
    updates = vocabulary_updates(adapter)
    arch = _adapted(source.arch, local_directory(adapter), updates)
    source = replace(source.untied() if source.arch.tied and not arch.tied else source, arch=arch)
    modules = {matrix_module(matrix): update for matrix, update in updates.items()}
    return source, {module: update for module, update in modules.items() if module in source.tensors}


def _adapted(arch: Architecture, directory: Path, updates: dict[Matrix, MatrixUpdate]) -> Architecture:
    if not updates:
        return arch
    path = adapter_file(directory)
    trained_on = read_record(directory).get("base_vocab_size")
    rows = max([arch.vocab_size, *(update.last_id() + 1 for update in updates.values())])
    tied = arch.tied and _stays_tied(updates)
    new = set(range(arch.vocab_size, rows))
    if trained_on not in (None, arch.vocab_size):
        _refuse(path, f"was trained on a model with {quote(trained_on)} ids, and this one has {arch.vocab_size}")
    for matrix, update in updates.items():
        if (size := update.size()) not in (None, rows):
            _refuse(path, f"holds {size} rows of {matrix}, and the model has {arch.vocab_size}")
        update.check(rows, arch.hidden_size)
    for matrix in MATRICES[: 1 if tied else 2]:
        update = updates.get(matrix)
        if new and not (update and ("whole" in update.names or new <= set(update.ids))):
            _refuse(
                path, f"is for {rows} ids, the model has {arch.vocab_size}, and it lacks rows of {matrix} for the rest"
            )
    return replace(arch, vocab_size=rows, tied=tied)


def _stays_tied(updates: dict[Matrix, MatrixUpdate]) -> bool:
    """Whether one matrix is enough for embedding and head, where the base ties them."""
    embed, head = updates.get("embed"), updates.get("head")
    if embed is None or head is None:
        # rows of the embedding alone are trained for both
        return embed is not None and embed.names.keys() == {"rows"}
    return embed.holds_the_same(head)


def _refuse(path: Path, problem: str) -> NoReturn:
    raise UserError(
        f"{problem}; give the model that the adapter was trained on, or merge it into that one (minorca.export, or "
        "PEFT's merge_and_unload) and give the result as the model",
        path=path,
    )


def check_shares_vocabulary(adapter: str | Path) -> None:
    """Raises UserError for an adapter that other requests cannot run beside, with other adapters or none."""
    if updates := vocabulary_updates(adapter):
        raise UserError(
            f"trains rows or all of {' and '.join(updates)}, which all requests share; merge it (python -m "
            f"minorca.export --model DIR --adapter {adapter} --output merged) and serve the result as the model",
            path=adapter,
        )
