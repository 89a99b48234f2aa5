"""Compiling the blocks, one by one, with ``torch.compile``: one graph serves all blocks of a kind.

What is compiled is the part of a block's forward that works on plain local tensors. What surrounds it stays eager:
FSDP2's hooks, a checkpoint, and the places where the residual stream is a DTensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import nn

from shardwright.distributed.runtime.forward import Around, Forward, wrap_forward
from shardwright.distributed.runtime.without_cache import train_without_cache
from shardwright.errors import ConfigError


class _Compiled(Around):
    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("past_key_values") is not None:
            return forward(*args, **kwargs)  # a cache knows the number of its layer: every block would get a graph
        return _compiled_call(self.backend)(forward, args, kwargs)


@cache
def _compiled_call(backend: str) -> Any:
    """One function for all blocks, so that they find each other's graphs."""
    return torch.compile(_call, backend=backend)


def _call(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return forward(*args, **kwargs)


def check_backend(backend: str) -> None:
    """Raise ConfigError where ``torch.compile`` knows no such backend."""
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise ConfigError(f"compile is {backend!r}, which torch.compile does not know. Known: {', '.join(known)}.")


def apply_compile(model: nn.Module, blocks: Iterable[str], backend: str = "inductor") -> None:
    """Compile the named blocks in place, inside of whatever stays eager around them. Names do not change.

    In training the model makes no key-value cache then, and blocks that are handed one (``generate``) run eagerly.
    """
    train_without_cache(model)
    for name in blocks:
        wrap_forward(model.get_submodule(name), _Compiled(backend), inside=lambda around: around.eager)
