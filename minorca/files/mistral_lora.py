"""mistral-finetune's adapters: lora.safetensors, and params.json with the sizes of their base, rank and scale.

Sources: mistral-finetune, finetune/checkpointing.py and model/args.py; mistral-inference, lora.py. Names and row order
are those of Mistral's own weights; what is read from here has PEFT's.
"""

import functools
import logging
from pathlib import Path

from torch import Tensor

from minorca.errors import UserError
from minorca.files.safe_io import find_file, quote, read_json
from minorca.files.tensor_files import TensorFiles
from minorca.model.architecture import MAX_NUMBER, Architecture, read_mistral_architecture
from minorca.model.layout import TARGETS, ProjectionSpec, peft_name_of_mistral_lora, projections
from minorca.model.lora import LoRASettings
from minorca.model.row_order import huggingface_order

log = logging.getLogger(__name__)

FILE = "lora.safetensors"
PARAMS = "params.json"
# of mistral-inference's load_lora and mistral-finetune's LoraArgs
DEFAULT_SCALE = 2.0


def is_mistral_lora(directory: Path) -> bool:
    """Whether a directory has such an adapter, and none in PEFT's format."""
    return find_file(directory, "adapter_config.json") is None and find_file(directory, FILE) is not None


def read_mistral_settings(directory: Path) -> LoRASettings:
    """The settings of an adapter; rank and scale from params.json, or the rank of its tensors and 2.0.

    Raises:
        UserError: as `open_mistral_lora`.
    """
    path = _params(directory)
    files = TensorFiles([directory / FILE])
    rank, scale = _rank_and_scale(path, files)
    parts = _check(files, read_mistral_architecture(path), rank)
    named = {part.name for part in parts}
    return LoRASettings(rank, scale * rank, tuple(target for target in TARGETS if target in named))


def open_mistral_lora(directory: Path) -> TensorFiles:
    """An adapter's tensors under PEFT's names, query and key rows in Hugging Face's order.

    Raises:
        UserError: params.json is missing or invalid, or a tensor is missing, unexpected or of another shape than it
            says; names file and key.
    """
    path = _params(directory)
    files = _MistralLoRAFiles([directory / FILE])
    arch = read_mistral_architecture(path)
    parts = _check(files, arch, _rank_and_scale(path, files)[0])
    files.rename(lambda name: peft_name_of_mistral_lora(name) or name)
    files.heads = {
        part.peft_name(layer, "B"): part.rotary_heads
        for layer in range(arch.layers)
        for part in parts
        if part.rotary_heads
    }
    return files


class _MistralLoRAFiles(TensorFiles):
    """Reads the rows of some tensors in Hugging Face's order.

    Attributes:
        heads: the heads that the rows of these tensors are made of.
    """

    def __init__(self, files: list[Path]):
        super().__init__(files)
        self.heads: dict[str, int] = {}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self.heads:
            return super().read(name, start, stop)
        rows = self.shape(name)[0]
        return super().read(name, 0, rows)[huggingface_order(rows, self.heads[name])[start:stop]]


def _params(directory: Path) -> Path:
    path = find_file(directory, PARAMS)
    if path is None:
        raise UserError(
            f"no {PARAMS}; {FILE} needs it for the number of heads and the scale: copy the one that mistral-finetune "
            "wrote beside it, or that of the base model",
            path=directory,
        )
    return path


def _rank_and_scale(path: Path, files: TensorFiles) -> tuple[int, float]:
    """From the lora section of params.json; the base model's own file has none."""
    section = read_json(path).get("lora")
    # a file of a model whose weights were all trained has one too
    if section is None or (isinstance(section, dict) and section.get("enable") is False):
        section = {}
    if not isinstance(section, dict):
        raise UserError(f"is {quote(section)}; expected an object with rank and scaling", path=path, field="lora")
    scale = section.get("scaling")
    if scale is None:
        _log_default(path)
        scale = DEFAULT_SCALE
    if type(scale) not in (int, float) or not 0 < scale <= MAX_NUMBER:
        message = f"is {quote(scale)}; expected a positive number of at most {MAX_NUMBER}"
        raise UserError(message, path=path, field="lora.scaling")
    rank = section.get("rank")
    if rank is None:
        shapes = (files.shape(name) for name in sorted(files.files) if name.endswith("lora_A.weight"))
        rank = next((shape[0] for shape in shapes if len(shape) == 2 and shape[0]), 1)
    if type(rank) is not int or rank <= 0:
        raise UserError(f"is {quote(rank)}; expected a positive int", path=path, field="lora.rank")
    return rank, float(scale)


@functools.cache
def _log_default(path: Path) -> None:
    """Once for each adapter."""
    log.warning("%s: no lora.scaling; using %s, as mistral-inference does", path, DEFAULT_SCALE)


def _check(files: TensorFiles, arch: Architecture, rank: int) -> list[ProjectionSpec]:
    """The projections that an adapter acts on, in every layer; checks the names and shapes of its tensors."""
    foreign = next((name for name in sorted(files.files) if peft_name_of_mistral_lora(name) is None), None)
    if foreign:
        raise UserError(
            f"unexpected tensor {foreign}; expected lora_A and lora_B of attention and feed_forward alone: give a "
            "whole checkpoint as the model, named consolidated.safetensors",
            path=files.files[foreign],
        )
    found = {name.split(".", 2)[2].rpartition(".lora_")[0] for name in files.files}
    parts = [part for parts in projections(arch).values() for part in parts if part.mistral_name in found]
    files.check(
        {
            part.mistral_lora_name(layer, matrix): shape
            for layer in range(arch.layers)
            for part in parts
            for matrix, shape in (("A", (rank, part.in_features)), ("B", (part.out_features, rank)))
        }
    )
    return parts
