"""Trainers that Hugging Face users have are told about sharded models, where they are installed."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from shardwright.distributed.apply.guards.fresh import Parallelized


def connect_trainers(on: Parallelized) -> None:
    """Let accelerate, transformers' Trainer and TRL take a model that is spread over ``on`` as it is.

    Nothing where accelerate is not installed: all of them stand on it.
    """
    if find_spec("accelerate") is not None:
        import_module("shardwright.hf").connect(on)  # by its name: it is a layer above, as the user's script is
