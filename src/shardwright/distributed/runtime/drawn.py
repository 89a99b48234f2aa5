"""Random numbers for sharded parameters and gradients, drawn outside of the model: noise, weights set anew, masks.

DTensor lets every rank draw for its own part. Ranks that hold the same part would then hold different ones, and nothing
brings them together again. Here all ranks draw for the whole tensor with the random state of the first, which is what
one process does, and each keeps its part.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardwright.distributed.runtime.implicit import joined, tensors_in
from shardwright.distributed.runtime.layout import part_of, whole
from shardwright.distributed.runtime.operations import DRAWS, writes
from shardwright.distributed.runtime.random_states import drawing_alike
from shardwright.errors import UnsupportedError

_DRAWS = DRAWS | {"dropout", "dropout_", "feature_dropout_", "alpha_dropout_"}
_INITIALISERS = {value for value in vars(nn.init).values() if isinstance(value, FunctionType)}


def is_drawn(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether ``func`` draws random numbers, or sets a whole weight anew (:mod:`torch.nn.init`)."""
    if func in _INITIALISERS:
        return True
    return func.__name__ in _DRAWS and kwargs.get("training") is not False  # dropout in evaluation mode draws nothing


def draw_whole(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func`` on whole tensors, alike on every rank; of the result each keeps its part. A collective.

    Raises:
        UnsupportedError: a graph would have to know of it, or each rank has a generator of its own.
    """
    target = next(x for x in tensors_in((args, kwargs)) if isinstance(x, DTensor))
    if kwargs.get("generator") is not None:
        raise UnsupportedError(
            f"{func.__name__} with a generator draws into a sharded parameter or gradient, and each rank has a "
            "generator of its own. Leave it out: all ranks then draw with the random state of the first."
        )
    if torch.is_grad_enabled() and target.requires_grad and func not in _INITIALISERS:
        raise UnsupportedError(
            f"{func.__name__} draws for a sharded parameter where gradients are recorded. Draw a mask or noise under "
            "torch.no_grad() first, and compute with that."
        )
    mesh = target.device_mesh
    assert mesh.mesh_dim_names is not None
    with torch.no_grad(), ExitStack() as alike:
        for axis, name in enumerate(mesh.mesh_dim_names):
            if mesh.size(axis) > 1:
                alike.enter_context(drawing_alike(mesh[name]))
        if not (writes(func) or kwargs.get("inplace")):
            return _cut(func(*joined(args), **joined(kwargs)), target)
        new = whole(target).clone()

        def given(x: Any) -> Any:
            return new if x is target else joined(x)

        func(*map(given, args), **{name: given(x) for name, x in kwargs.items()})
        target.to_local().copy_(part_of(new, target))
    return target


def _cut(result: Tensor, like: DTensor) -> Any:
    """This rank's part of ``result``; the whole of what has another shape, which every rank has."""
    if result.shape != like.shape:
        return result
    cut: Any = torch.empty_like(like, dtype=result.dtype)
    cut.to_local().copy_(part_of(result, like))
    return cut
