"""Adapters that are written alone: what is refused, what is copied, and how the base is named."""

import shlex

import pytest
import torch
from safetensors.torch import load_file

from minorca import UserError
from minorca.export.__main__ import main
from tests.files.test_mistral_lora import consolidated, write_lora
from tests.helpers import random_adapter

pytestmark = pytest.mark.usefixtures("own_cache")


def test_a_pickled_adapter_whose_tensors_share_memory(save_mistral, tmp_path):
    """As torch.save leaves the two matrices of a tied model."""
    _, theirs = save_mistral()
    random_adapter(theirs, tmp_path / "adapter", ("q",), modules_to_save=["embed_tokens", "lm_head"])
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    names = [f"base_model.model.{name}.weight" for name in ("lm_head", "model.embed_tokens")]
    tensors[names[0]] = tensors[names[1]]
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter" / "adapter_model.bin")
    main(["--adapter-only", f"--adapter={tmp_path / 'adapter'}", f"--output={tmp_path / 'out'}"])
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert written.keys() == tensors.keys() and all(torch.equal(written[name], tensors[name]) for name in tensors)


def test_mistral_finetunes_is_not_converted(save_mistral, tmp_path):
    base, _ = consolidated(save_mistral)
    write_lora(base, tmp_path / "lora")
    with pytest.raises(UserError, match="is mistral-finetune's, which is not converted to PEFT's.*--format gguf"):
        main(["--adapter-only", f"--adapter={tmp_path / 'lora'}", f"--output={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_a_method_of_merging_one_adapter_that_stays_alone(tmp_path):
    with pytest.raises(UserError, match="--merge changes nothing with --adapter-only"):
        main(["--adapter-only", "--adapter=a", "--merge=ties", f"--output={tmp_path / 'out'}"])


@pytest.mark.parametrize("is_gguf", [False, True])
def test_the_command_that_makes_the_base(is_gguf, save_mistral, tmp_path):
    """The Modelfile's first line can be run, also where the base is a GGUF file, which has no other directory."""
    directory, theirs = save_mistral()
    model = directory.rename(tmp_path / "a model")
    random_adapter(theirs, tmp_path / "adapter", ("q",))
    if is_gguf:
        main([f"--model={model}", f"--output={tmp_path / 'g'}", "--format=gguf"])
        model = tmp_path / "g" / "model-F16.gguf"
    options = [f"--adapter={tmp_path / 'adapter'}", "--format=gguf", f"--output={tmp_path / 'out'}"]
    main(["--adapter-only", f"--model={model}", *options])
    first = (tmp_path / "out" / "Modelfile").read_text().splitlines()[0]
    command = shlex.split(first.partition("minorca.export ")[2])
    assert command == ["--model", str(model), "--output", "base", "--format", "gguf"]
