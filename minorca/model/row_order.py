"""The order of the rows of query and key matrices, which files have in two."""

import torch
from torch import Tensor


def huggingface_order(rows: int, heads: int) -> Tensor:
    """Which rows of a query or key matrix in Mistral's files are Hugging Face's, in their order.

    Mistral's files order the rows of a head for rotary pairs (2i, 2i + 1), Hugging Face's for (i, i + D/2).
    """
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).flatten()


def in_mistral_order(weight: Tensor, heads: int) -> Tensor:
    """A query or key matrix as Mistral's and llama.cpp's files have it; another, of 0 heads, as it is."""
    return weight[mistral_order(len(weight), heads)] if heads else weight


def mistral_order(rows: int, heads: int) -> Tensor:
    """Which rows in Hugging Face's files are those of Mistral's, in their order."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()
