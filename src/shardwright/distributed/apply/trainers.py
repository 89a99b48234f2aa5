"""Trainers that Hugging Face users have are told about sharded models, where they are installed."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec


def connect_trainers() -> None:
    """Let accelerate, transformers' Trainer and TRL take a sharded model as it is.

    Nothing where accelerate is not installed: all of them stand on it.
    """
    if find_spec("accelerate") is not None:
        import_module("shardwright.hf").connect()  # by its name: it is a layer above, as the user's script is
