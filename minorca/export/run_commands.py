"""The commands that run a directory of weights from the hub, in the engines that can read it."""

from collections.abc import Iterator
from pathlib import Path

from minorca.data.portable_files import has_tokenizer, recorded_template
from minorca.data.tokenizer_files import chat_templates, read_settings
from minorca.files.adapters import read_adapter_settings, read_record
from minorca.files.hub import HubId

Command = tuple[str, str, str]

_TRANSFORMERS = """\
from transformers import pipeline

generate = pipeline("text-generation", model="{repository}", dtype="auto", device_map="auto")
print(generate({prompt})[0]["generated_text"]{answer})"""
_PEFT = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{tokenizer}")
model = AutoPeftModelForCausalLM.from_pretrained("{repository}", dtype="auto", device_map="auto")
{inputs}
outputs = model.generate(**inputs.to(model.device), max_new_tokens=256)
print(tokenizer.decode(outputs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
_CHAT = '[{"role": "user", "content": "Hello!"}]'
_TEXT = '"Once upon a time"'
_CHAT_INPUTS = f"""\
chat = {_CHAT}
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)"""
_TEXT_INPUTS = f'inputs = tokenizer({_TEXT}, return_tensors="pt")'


def run_commands(directory: Path, repository: str, base: HubId | None, alone: bool) -> Iterator[Command]:
    """Engine, language and text of each command, by the files that the directory has.

    Args:
        repository: where the directory is on the hub.
        base: of an adapter alone.
    """
    if alone and base and (directory / "adapter_config.json").exists():
        yield from _of_adapter(directory, repository, base)
    elif (directory / "config.json").exists():
        chats = _has_template(directory)
        prompt, answer = (_CHAT, '[-1]["content"]') if chats else (_TEXT, "")
        yield "minorca", "bash", f"python -m minorca.generate --model {repository} {_mode(chats)}"
        yield "transformers", "python", _TRANSFORMERS.format(repository=repository, prompt=prompt, answer=answer)
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
    quantize = "--quantize nf4 " if read_record(directory).get("quantize") else ""
    brings_tokenizer = has_tokenizer(directory)
    # without one it is the base's, of which nothing is known here
    chats = _has_template(directory) or not brings_tokenizer
    mode = _mode(chats or recorded_template(directory) not in (None, "none"))
    yield "minorca", "bash", f"python -m minorca.generate --model {base} --adapter {repository} {quantize}{mode}"
    tokenizer = repository if brings_tokenizer else base.repository
    inputs = _CHAT_INPUTS if chats else _TEXT_INPUTS
    yield "transformers and PEFT", "python", _PEFT.format(repository=repository, tokenizer=tokenizer, inputs=inputs)
    if not (settings.modules_to_save or settings.token_ids or {"embed", "head"} & set(settings.targets)):
        # vLLM has no adapters of embedding and head
        revision = f" --revision {base.revision}" if base.revision else ""
        adapter = f"{repository.rpartition('/')[2]}={repository}"
        options = f"--enable-lora --max-lora-rank {settings.rank} --lora-modules {adapter}"
        yield "vLLM", "bash", f"vllm serve {base.repository}{revision} {options}"


def _has_template(directory: Path) -> bool:
    """Whether transformers finds a chat template there, without which it refuses messages."""
    return bool(chat_templates(directory, read_settings(directory)))


def _mode(chats: bool) -> str:
    return "--chat" if chats else f"--prompt {_TEXT} --raw"
