"""Mistral's own layout: consolidated.safetensors, one file of any size, params.json, and the tokenizer in its format.

What reads it: mistral-inference (transformer.py, args.py, main.py), mistral-finetune (wrapped_model.py), vLLM with
--load-format mistral (transformers_utils/configs/mistral.py), and transformers' convert_mistral_weights_to_hf.py.
"""

import json
from pathlib import Path

from minorca.data.portable_files import portable_files, tokenizer_files
from minorca.export.contents import Contents, ExportedTensor, check_new, merged_tensors, read_contents
from minorca.export.effect import print_effect, readers, rounding
from minorca.export.merging import Merge
from minorca.export.mistral_tokenizer import with_mistral_tokenizer
from minorca.files.atomic import publish, write_files
from minorca.files.tensor_files import PlannedTensor, write_one_file
from minorca.files.weights import open_model
from minorca.model.architecture import Architecture
from minorca.model.layout import SourceTensor, outside_name, source_tensors
from minorca.model.row_order import in_mistral_order
from minorca.progress import progress
from minorca.receipts import write_receipt


def export_consolidated(model: str | Path, adapter: str | Path | Merge | None, output: Path) -> None:
    """Writes weights, params.json and tokenizer to `output`, which appears when it is complete.

    Args:
        adapter: what is merged in.

    Raises:
        UserError: as `minorca.export.huggingface.export`.
    """
    check_new(output)
    contents = read_contents(model, adapter)
    source, tok = contents.source, contents.tok
    if tok:
        files = portable_files(tok, contents.template, source.directory)
        files = with_mistral_tokenizer(files, tok, contents.template)
    else:
        files = tokenizer_files(source.directory)
    pairs = _pairs(contents)

    def write(temporary: Path) -> None:
        (temporary / "params.json").write_text(json.dumps(params_json(source.arch), indent=2) + "\n")
        write_files(temporary, files)
        planned = [PlannedTensor(theirs.name, theirs.shape, ours.dtype) for theirs, ours in pairs]
        described = progress(pairs, "writing", unit="tensors")
        values = (in_mistral_order(ours.make(), theirs.rotary_heads) for theirs, ours in described)
        write_one_file(temporary / "consolidated.safetensors", planned, values)
        write_receipt(temporary, contents.receipt(format="consolidated"))

    publish(output, write)
    head = ", the head a copy of the embedding, to which it is tied" if source.arch.tied else ""
    print(f"{output}: {len(pairs)} tensors in Mistral's layout{contents.merged}{head}")
    print_effect(contents, readers(merged_tensors(open_model(output), None, {})), rounding(contents))


def params_json(arch: Architecture) -> dict:
    """params.json of a network, with what is left out where the default of every reader is right."""
    params = {
        "dim": arch.hidden_size,
        "n_layers": arch.layers,
        "head_dim": arch.head_dim,
        "hidden_dim": arch.intermediate_size,
        "n_heads": arch.heads,
        "n_kv_heads": arch.kv_heads,
        "norm_eps": arch.norm_eps,
        "vocab_size": arch.vocab_size,
        "rope_theta": arch.rope_theta,
    }
    if arch.window is not None:
        params["sliding_window"] = arch.window
    if arch.tied:
        params["tied_embeddings"] = True
    if arch.max_positions:
        # vLLM reads the one, transformers the other
        params |= {"max_position_embeddings": arch.max_positions, "max_seq_len": arch.max_positions}
    return params


def _pairs(contents: Contents) -> list[tuple[SourceTensor, ExportedTensor]]:
    """Each tensor of Mistral's layout, and the one that it is made of. There is a head even where it is tied, which all
    its readers need.
    """
    arch = contents.source.arch
    theirs = [tensor for stacked in source_tensors(arch, "mistral").values() for tensor in stacked]
    pairs = list(zip(theirs, contents.tensors, strict=True))
    if arch.tied:
        head = SourceTensor(outside_name("head", "mistral"), arch.vocab_size, arch.hidden_size)
        pairs.append((head, contents.tensors[0]))
    return pairs
