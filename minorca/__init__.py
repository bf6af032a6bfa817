"""minorca: a low-level PyTorch engine for Mistral models."""

from typing import TYPE_CHECKING

from minorca.data.chat_template import render_chat
from minorca.data.tokenizer import load_tokenizer
from minorca.errors import UserError

if TYPE_CHECKING:
    from minorca.model.build import load_model

__version__ = "0.2.0"

__all__ = ["UserError", "load_model", "load_tokenizer", "render_chat"]


def __getattr__(name: str):
    """Imports `load_model` when it is asked for: torch takes seconds to import, and rendering rows needs none."""
    if name == "load_model":
        from minorca.model.build import load_model

        return load_model
    raise AttributeError(f"module minorca has no attribute {name}")
