"""An adapter alone, as a directory of its own that names its base by its hub id."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from minorca.data.portable_files import tokenizer_files
from minorca.errors import UserError
from minorca.export.contents import check_new
from minorca.files.adapters import RECORD, AdapterConfig, adapter_file, read_adapter_settings
from minorca.files.atomic import publish, write_files
from minorca.files.hub import HubId, local_directory, parse_id
from minorca.files.mistral_lora import is_mistral_lora
from minorca.files.safe_io import MAX_JSON_BYTES, find_file, read_small
from minorca.files.tensor_files import TensorFiles
from minorca.receipts import of_adapters, write_receipt


def named_base(adapter: str | Path) -> HubId | None:
    """The hub id and, where it is known, the commit that an adapter names as its base; None for a directory."""
    values = AdapterConfig(local_directory(adapter)).values
    base, revision = values.get("base_model_name_or_path"), values.get("revision")
    if not isinstance(base, str):
        return None
    # with a commit it is the hub's, also where a directory here has its name
    with_revision = parse_id(f"{base}@{revision}") if isinstance(revision, str) else None
    found = with_revision or parse_id(base)
    return found if found and (found is with_revision or found.revision is None) else None


def export_adapter(adapter: str | Path, output: Path, base: HubId | None = None) -> None:
    """Writes an adapter's files to `output`, which appears when it is complete; its tensors as safetensors.

    Args:
        base: what it is to name as its base; None: what it names.

    Raises:
        UserError: what is wrong with which file, or that `output` exists.
    """
    check_new(output)
    directory = local_directory(adapter)
    if is_mistral_lora(directory):
        raise UserError(
            "is mistral-finetune's, which is not converted to PEFT's format; give it to others as it is, choose "
            "--format gguf, or merge it: leave out --adapter-only",
            path=directory,
        )
    read_adapter_settings(adapter)
    config = AdapterConfig(directory).values
    if base:
        config |= {"base_model_name_or_path": base.repository, "revision": base.revision}
    files = tokenizer_files(directory) | {"adapter_config.json": (json.dumps(config, indent=2) + "\n").encode()}
    if find_file(directory, RECORD):
        files[RECORD] = read_small(directory / RECORD, MAX_JSON_BYTES)
    tensors = TensorFiles([adapter_file(directory)])

    def write(temporary: Path) -> None:
        write_files(temporary, files)
        # copies: two tensors of a pickled file may share their memory
        content = {name: tensors.whole(name).clone(memory_format=torch.contiguous_format) for name in tensors.files}
        save_file(content, temporary / "adapter_model.safetensors", {"format": "pt"})
        write_receipt(temporary, {"export": {"format": "hf"}} | of_adapters([adapter]))

    publish(output, write)
    print(f"{output}: {len(tensors.files)} tensors of {adapter}")
