"""PEFT's files for LoRA adapters. The format is that of PEFT's checkpoint guide.

What reads adapters here reads mistral-finetune's too (mistral_lora.py).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from safetensors.torch import save_file
from torch import Tensor, nn

from minorca.errors import UserError, raise_problems
from minorca.files.hub import local_directory, parse_id
from minorca.files.mistral_lora import FILE as MISTRAL_FILE
from minorca.files.mistral_lora import PARAMS, is_mistral_lora, open_mistral_lora, read_mistral_settings
from minorca.files.safe_io import find_file, quote, read_json, read_optional_json
from minorca.files.tensor_files import WEIGHT_FILES, TensorFiles
from minorca.model.architecture import MAX_NUMBER, MAX_SIZE
from minorca.model.layout import (
    MATRICES,
    TARGETS,
    Matrix,
    Target,
    adapted_by,
    matrix_peft_names,
    module_name,
    plain_peft_name,
)
from minorca.model.lora import LoRASettings, PartSettings, adapter_parameters, lora_scale
from minorca.model.network import Mistral
from minorca.model.quantization import Quantization
from minorca_kernels import fill_rows


def save_adapter(directory: Path, tensors: dict[str, Tensor], settings: LoRASettings, base_model: str) -> None:
    """Writes adapter_model.safetensors and adapter_config.json into an existing directory.

    base_model: a directory or a hub id.
    """
    base = parse_id(base_model)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.repository if base else base_model,
        "revision": base.revision if base else None,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "target_modules": [module_name(0, target).rpartition(".")[2] for target in settings.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": [_peft_name(matrix) for matrix in settings.modules_to_save] or None,
        "trainable_token_indices": {
            _peft_name(matrix): list(settings.token_ids)
            for matrix in MATRICES
            if matrix_peft_names(matrix)["rows"] in tensors
        }
        or None,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    save_file(
        {name: t.contiguous() for name, t in tensors.items()}, directory / "adapter_model.safetensors", {"format": "pt"}
    )
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _peft_name(matrix: Matrix) -> str:
    """How PEFT's settings name a matrix of the vocabulary."""
    return module_name(0, matrix).rpartition(".")[2]


# beside an adapter of ours: the template of its training, how its base was quantized, and the size of its base's
# vocabulary where it adds to it
RECORD = "minorca.json"


def read_record(directory: Path) -> dict:
    """What a run of ours noted beside its adapter; empty for adapters of others."""
    return read_optional_json(directory / RECORD)


MERGE = "merge the adapter in PEFT first (merge_and_unload, then save_pretrained), and give the result as the model"
# fields of adapter_config.json that change what an adapter computes, beyond what this engine does
_UNSUPPORTED = (
    "use_dora",
    "fan_in_fan_out",
    "lora_bias",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "velora_config",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# There is a pattern for each projection at most: Mistral Large has 616.
MAX_PATTERNS = 10_000
MAX_PATTERN_CHARACTERS = 1000


def check_finite(tensor: Tensor, directory: str | Path, name: str) -> None:
    """Raises UserError where a tensor of an adapter has values that are NaN or infinite."""
    if not tensor.isfinite().all():
        raise UserError("contains NaN or infinite values; did training diverge?", path=directory, field=name)


def read_adapter_settings(directory: str | Path) -> LoRASettings:
    """The settings of an adapter in PEFT's format or mistral-finetune's.

    What this engine would compute differently is refused.

    Which projections have an adapter is what the tensors say, however target_modules and its like spell it.

    Raises:
        UserError: naming the file and field.
    """
    directory = local_directory(directory)
    if is_mistral_lora(directory):
        return read_mistral_settings(directory)
    fields = AdapterConfig(directory)
    config, path = fields.values, fields.path
    if config.get("peft_type") != "LORA":
        fields.refuse("peft_type", "expected LORA")
    if config.get("bias", "none") != "none":
        fields.refuse("bias", f"expected none; {MERGE}")
    raise_problems(
        UserError(f"is {quote(config[field])}, which is not supported; {MERGE}", path=path, field=field)
        for field in _UNSUPPORTED
        if config.get(field)
    )
    # the others change the base's weights too
    if config.get("init_lora_weights") not in (None, True, False, "gaussian", "orthogonal", "eva"):
        fields.refuse("init_lora_weights", "convert the adapter to a plain one with PEFT first")
    rank = fields.rank("r", config.get("r"))
    alpha = fields.alpha("lora_alpha", config.get("lora_alpha"))
    rslora = bool(config.get("use_rslora"))
    whole, ids = fields.modules_to_save(), fields.token_ids()
    places = {module_name(layer, target): (layer, target) for layer, target in _adapted(directory)}
    known: tuple[Target | Matrix, ...] = (*TARGETS, *MATRICES)
    named = {name for _, name in places.values()}
    targets: list[Target | Matrix] = [target for target in known if target in named]
    ranks = fields.by_module("rank_pattern", list(places), rank, fields.rank)
    alphas = fields.by_module("alpha_pattern", list(places), alpha, fields.alpha)
    settings = LoRASettings(
        rank,
        alpha,
        tuple(targets),
        rslora=rslora,
        partial=_chooses_layers(config),
        modules_to_save=whole,
        token_ids=tuple(next(iter(ids.values()), ())),
    )
    parts = {
        place: PartSettings(ranks[name], lora_scale(ranks[name], alphas[name], rslora))
        for name, place in places.items()
    }
    return replace(settings, parts={place: part for place, part in parts.items() if part != settings.part(*place)})


_MATRICES: dict[str, Matrix] = {_peft_name(matrix): matrix for matrix in MATRICES}


@dataclass(frozen=True)
class OtherBase:
    """An adapter was trained on a base that was quantized in another way than the one that it is to be used with."""

    trained_on: Quantization | None
    given: Quantization | None

    def __str__(self) -> str:
        trained_on, given = (base or "unquantized weights" for base in (self.trained_on, self.given))
        return f"was trained on {trained_on}, and the model has {given}"


def other_base(directory: str | Path, quantization: Quantization | None) -> OtherBase | None:
    """None where an adapter was trained on a base that was quantized so, or has no record of it.

    Raises:
        UserError: an invalid record.
    """
    path = local_directory(directory) / RECORD
    record = read_record(path.parent)
    if not record:
        return None
    quantize, double_quant = record.get("quantize"), record.get("double_quant", True)
    if quantize not in (None, "nf4") or type(double_quant) is not bool:
        message = (
            f"is {quote(quantize)}, double_quant {quote(double_quant)}; expected nf4, and true or false, or neither"
        )
        raise UserError(message, path=path, field="quantize")
    trained_on = Quantization(double_quant) if quantize else None
    return None if trained_on == quantization else OtherBase(trained_on, quantization)


class AdapterConfig:
    """adapter_config.json, with errors that name the field."""

    def __init__(self, directory: Path):
        path = find_file(directory, "adapter_config.json")
        if path is None:
            whole = any(find_file(directory, name) for name in (*WEIGHT_FILES, "config.json"))
            advice = "; a whole model is given as the model" if whole else ""
            raise UserError(
                f"no adapter_config.json; expected an adapter's directory in PEFT's format, or {MISTRAL_FILE} of "
                f"mistral-finetune{advice}",
                path=directory,
            )
        self.path = path
        self.values = read_json(path)

    def refuse(self, field: str, expected: str) -> NoReturn:
        raise UserError(f"is {quote(self.values.get(field))}; {expected}", path=self.path, field=field)

    def rank(self, field: str, value: Any) -> int:
        if type(value) is not int or not 0 < value <= MAX_SIZE:
            self.refuse(field, f"expected a positive integer of at most {MAX_SIZE}")
        return value

    def alpha(self, field: str, value: Any) -> float:
        if type(value) not in (int, float) or not abs(value) <= MAX_NUMBER:
            self.refuse(field, f"expected a number of at most {MAX_NUMBER}")
        return value

    def modules_to_save(self) -> tuple[Matrix, ...]:
        """The matrices of the vocabulary that are trained whole."""
        names = self.values.get("modules_to_save") or []
        if not isinstance(names, list) or not all(str(name).rpartition(".")[2] in _MATRICES for name in names):
            self.refuse("modules_to_save", f"expected {' and '.join(_MATRICES)} at most; {MERGE}")
        found = {_MATRICES[name.rpartition(".")[2]] for name in names}
        return tuple(matrix for matrix in MATRICES if matrix in found)

    def token_ids(self) -> dict[Matrix, list[int]]:
        """The ids whose rows are trained, of each matrix that has some."""
        field = "trainable_token_indices"
        values = self.values.get(field) or {}
        values = values if isinstance(values, dict) else {"embed_tokens": values}
        found = {}
        for name, ids in values.items():
            valid = isinstance(ids, list) and all(type(i) is int and 0 <= i < MAX_SIZE for i in ids)
            if not valid or len(set(ids)) < len(ids) or name.rpartition(".")[2] not in _MATRICES:
                self.refuse(field, f"expected ids, each once, of {' and '.join(_MATRICES)} at most; {MERGE}")
            if ids:
                found[_MATRICES[name.rpartition(".")[2]]] = ids
        return found

    def by_module(self, field: str, modules: list[str], default: Any, check: Callable[[str, Any], Any]) -> dict:
        """Module -> its rank or alpha: of the first of the field's patterns that matches the end of its name."""
        values = self.values.get(field) or {}
        if not isinstance(values, dict) or len(values) > MAX_PATTERNS:
            self.refuse(field, f"expected an object of at most {MAX_PATTERNS} names or patterns of modules")
        chosen = dict.fromkeys(modules, default)
        for pattern, value in reversed(values.items()):
            check(field, value)
            chosen |= dict.fromkeys(self._matching(field, modules, pattern), value)
        return chosen

    def _matching(self, field: str, modules: list[str], pattern: str) -> list[str]:
        """Arrow's expressions take linear time, whoever wrote them; Python's may take for ever."""
        import pyarrow
        from pyarrow import compute

        try:
            if len(pattern) > MAX_PATTERN_CHARACTERS:
                raise ValueError
            # PEFT's rule (utils/other.py, get_pattern_key)
            options = compute.MatchSubstringOptions(rf"^(.*\.)?({pattern})$")
            matches = compute.call_function("match_substring_regex", [pyarrow.array(modules)], options)
        except ValueError:
            self.refuse(field, f"expected names of modules or regular expressions, got {quote(pattern)}")
        return [module for module, is_match in zip(modules, matches.to_pylist()) if is_match]


def _chooses_layers(config: dict) -> bool:
    """Whether the settings may leave out layers: else an adapter without some of the model's is another model's."""
    targets = config.get("target_modules")
    if isinstance(targets, str):
        return targets != "all-linear"
    dotted = isinstance(targets, list) and any("." in str(target) for target in targets)
    return dotted or config.get("layers_to_transform") is not None or bool(config.get("exclude_modules"))


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter, by the names of its files."""
    return find_file(directory, "adapter_config.json") is not None or is_mistral_lora(directory)


def adapter_paths(adapter: str | Path) -> list[Path]:
    """The files of an adapter from which its numbers follow: tensors and settings."""
    directory = local_directory(adapter)
    settings = PARAMS if is_mistral_lora(directory) else "adapter_config.json"
    return [adapter_file(directory), directory / settings]


def adapter_file(adapter: str | Path) -> Path:
    """The tensor file in an adapter's directory."""
    directory = local_directory(adapter)
    if is_mistral_lora(directory):
        return directory / MISTRAL_FILE
    names = ("adapter_model.safetensors", "adapter_model.bin")
    path = next(filter(None, (find_file(directory, name) for name in names)), None)
    if path is None:
        raise UserError(f"no {names[0]} or {names[1]}", path=directory)
    return path


def open_tensors_of(directory: Path) -> TensorFiles:
    """The tensor file, its names PEFT's and plain."""
    if is_mistral_lora(directory):
        return open_mistral_lora(directory)
    files = TensorFiles([adapter_file(directory)])
    files.rename(plain_peft_name)
    for matrix in MATRICES:
        whole = matrix_peft_names(matrix)["whole"]
        if whole in files.files:
            # PEFT saves these too where the vocabulary was resized: the same again, and what it was before
            for copy in ("modules_to_save", "original_module"):
                files.files.pop(f"{whole.removesuffix('weight')}{copy}.weight", None)
    return files


def _adapted(directory: Path) -> list[tuple[int, Target | Matrix]]:
    """The layers and projections that an adapter's tensors act on, and the matrices of the vocabulary, of layer 0."""
    files = open_tensors_of(directory)
    held = {names[part] for names in map(matrix_peft_names, MATRICES) for part in ("whole", "rows")}
    places = {name: adapted_by(name) for name in files.files if name not in held}
    for name, place in places.items():
        if place is None:
            raise UserError(
                f"unexpected tensor {name}; expected LoRA tensors of a Mistral network's projections; {MERGE}",
                path=files.files[name],
            )
    if not files.files:
        raise UserError("holds no tensors", path=adapter_file(directory))
    return sorted({place for place in places.values() if place})


def open_adapter(directory: str | Path, expected: dict[str, nn.Parameter]) -> TensorFiles:
    """The tensor file, opened, once it is sure to hold exactly the tensors of `expected` (`adapter_parameters`).

    Those of the vocabulary may be beside them: files/vocabulary.py reads them for a model that does not train them.

    Raises:
        UserError: as `TensorFiles.check`.
    """
    files = open_tensors_of(local_directory(directory))
    for name in {name for matrix in MATRICES for name in matrix_peft_names(matrix).values()} - expected.keys():
        files.files.pop(name, None)
    files.check({name: tuple(parameter.shape) for name, parameter in expected.items()})
    return files


def load_adapter(model: Mistral, directory: str | Path) -> None:
    """Fills a model's adapters, sharded or not, from a file; errors as `open_adapter`."""
    parameters = adapter_parameters(model)
    files = open_adapter(directory, parameters)
    for name, parameter in parameters.items():
        fill_rows(parameter, lambda start, stop, name=name: files.read(name, start, stop))
