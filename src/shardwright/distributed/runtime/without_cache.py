"""Training steps without a key-value cache, which transformers' models fill by default."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from shardwright.distributed.runtime.forward import Around, Forward, original_class, wrap_forward
from shardwright.errors import UnsupportedError


class _WithoutCache(Around):
    def __init__(self, *, refuse: bool) -> None:
        self.refuse = refuse

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if module.training and torch.is_grad_enabled():
            if kwargs.get("past_key_values") is None:
                kwargs = {**kwargs, "use_cache": False}
            elif self.refuse:
                raise UnsupportedError(
                    "Activation checkpointing runs every block twice, which would append to past_key_values twice. "
                    "Train without a cache, or without activation checkpointing."
                )
        return forward(*args, **kwargs)


def train_without_cache(model: nn.Module, *, refuse: bool = False) -> None:
    """Keep training steps of ``model`` from making a cache, in place; a model that knows none is left as it is.

    What wraps a model may hand on whatever it is called with (PEFT's does): then it is the model inside that is asked.

    Args:
        refuse: raise UnsupportedError where a training step is handed one.
    """
    if "use_cache" in inspect.signature(original_class(model).forward).parameters:
        wrap_forward(model, _WithoutCache(refuse=refuse))
        return
    for child in model.children():
        train_without_cache(child, refuse=refuse)
