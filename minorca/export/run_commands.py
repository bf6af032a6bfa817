"""The commands that run a directory of weights from the hub, in the engines that can read it."""

from collections.abc import Iterator
from pathlib import Path

from minorca.files.adapters import read_adapter_settings
from minorca.files.hub import HubId
from minorca.files.safe_io import read_json

Command = tuple[str, str, str]

_TRANSFORMERS = """\
from transformers import pipeline

generate = pipeline("text-generation", model="{repository}", dtype="auto", device_map="auto")
print(generate([{{"role": "user", "content": "Hello!"}}])[0]["generated_text"][-1]["content"])"""
_PEFT = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repository}")
model = AutoPeftModelForCausalLM.from_pretrained("{repository}", dtype="auto", device_map="auto")
chat = [{{"role": "user", "content": "Hello!"}}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
outputs = model.generate(**inputs.to(model.device), max_new_tokens=256)
print(tokenizer.decode(outputs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


def run_commands(directory: Path, repository: str, base: HubId | None, alone: bool) -> Iterator[Command]:
    """Engine, language and text of each command, by the files that the directory has.

    Args:
        repository: where the directory is on the hub.
        base: of an adapter alone.
    """
    if alone and base and (directory / "adapter_config.json").exists():
        yield from _of_adapter(directory, repository, base)
    elif (directory / "config.json").exists():
        yield "minorca", "bash", f"python -m minorca.generate --model {repository} --chat"
        yield "transformers", "python", _TRANSFORMERS.format(repository=repository)
        yield "vLLM", "bash", f"vllm serve {repository}"
    elif (directory / "params.json").exists():
        mistral = "--tokenizer-mode mistral --config-format mistral --load-format mistral"
        yield "minorca", "bash", f"python -m minorca.generate --model {repository} --chat"
        yield "vLLM", "bash", f"vllm serve {repository} {mistral}"
    files = sorted(path.name for path in directory.glob("*.gguf"))
    if files and alone:
        fetch = f"hf download {repository} {files[0]} --local-dir ."
        yield "llama.cpp, with the base as GGUF", "bash", f"{fetch}\nllama-cli -m BASE.gguf --lora {files[0]}"
    elif files:
        yield "llama.cpp", "bash", f"llama-cli -hf {repository}"
        yield "Ollama", "bash", f"ollama run hf.co/{repository}"


def _of_adapter(directory: Path, repository: str, base: HubId) -> Iterator[Command]:
    settings = read_adapter_settings(directory)
    record = directory / "minorca.json"
    quantize = "--quantize nf4 " if record.exists() and read_json(record).get("quantize") else ""
    yield "minorca", "bash", f"python -m minorca.generate --model {base} --adapter {repository} {quantize}--chat"
    yield "transformers and PEFT", "python", _PEFT.format(repository=repository)
    if not (settings.modules_to_save or settings.token_ids or {"embed", "head"} & set(settings.targets)):
        # vLLM has no adapters of embedding and head
        revision = f" --revision {base.revision}" if base.revision else ""
        adapter = f"{repository.rpartition('/')[2]}={repository}"
        options = f"--enable-lora --max-lora-rank {settings.rank} --lora-modules {adapter}"
        yield "vLLM", "bash", f"vllm serve {base.repository}{revision} {options}"
