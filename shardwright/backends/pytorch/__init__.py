"""The backend for stock PyTorch: a training script that a person owns, with a small runtime beside it."""

from shardwright.backends.pytorch.emit import emit

__all__ = ["emit"]
