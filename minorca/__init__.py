"""minorca: a low-level PyTorch engine for Mistral models."""

from minorca.chat import render_chat
from minorca.errors import UserError
from minorca.loading import load_model
from minorca.tokenizer import load_tokenizer

__all__ = ["UserError", "load_model", "load_tokenizer", "render_chat"]
