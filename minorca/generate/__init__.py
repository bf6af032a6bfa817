"""Text generation: the engine, its key/value cache, sampling, and the command."""

from minorca.generate.batch import generate

__all__ = ["generate"]
