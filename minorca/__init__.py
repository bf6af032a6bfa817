"""minorca: a low-level PyTorch engine for Mistral models."""

import importlib
from typing import TYPE_CHECKING

from minorca.errors import UserError
from minorca.waiting import set_waiting_policy

if TYPE_CHECKING:
    from minorca.data.chat_template import render_chat
    from minorca.data.tokenizer import load_tokenizer
    from minorca.model.build import load_model

__version__ = "0.2.0"

__all__ = ["UserError", "load_model", "load_tokenizer", "render_chat"]

# before anything here imports torch
set_waiting_policy()

_MODULES = {
    "load_model": "minorca.model.build",
    "load_tokenizer": "minorca.data.tokenizer",
    "render_chat": "minorca.data.chat_template",
}


def __getattr__(name: str):
    """Imports a function when it is asked for: torch takes seconds, and `minorca doctor` runs where a package is
    broken.
    """
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module minorca has no attribute {name}")
