"""Where the positions of a sequence are in the arguments and results of a module."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from shardwright.distributed.runtime.context.parts import Split
from shardwright.distributed.runtime.forward import original_class

RESULT = "result"  # what the paths of results begin with
Change = Callable[[str, Tensor], Any]


@dataclass(frozen=True)
class Place:
    """The dim of a tensor that holds positions.

    Attributes:
        merged: whether the batch is in that dim, too, before the positions.
    """

    dim: int
    merged: bool = False

    def split(self, of_stream: Split, batch: int) -> Split:
        """How the dim is dealt out, in a block whose stream is dealt out so."""
        return replace(of_stream, dim=self.dim, outer=batch if self.merged else 1)


@dataclass(frozen=True)
class Places:
    """The places of all tensors that hold an item for every position, by path (``position_embeddings.0``)."""

    arguments: tuple[tuple[str, Place], ...] = ()
    results: tuple[tuple[str, Place], ...] = ()


def mapped(value: Any, path: str, change: Change) -> Any:
    """``value`` with every tensor in it changed; tuples, lists and dicts are looked into, other objects are not."""
    if isinstance(value, Tensor):
        return change(path, value)
    if type(value) is dict:
        return {key: mapped(item, f"{path}.{key}", change) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(mapped(item, f"{path}.{number}", change) for number, item in enumerate(value))
    return value


def argument_names(module: nn.Module) -> list[str]:
    """The names of the arguments of the module's own forward, in their order."""
    return list(inspect.signature(original_class(module).forward).parameters)[1:]


def mapped_arguments(
    names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any], change: Change
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with every tensor changed; the path of a positional one begins with its name, too."""
    named = [*names, *(f"*{number}" for number in range(len(args) - len(names)))]
    new = tuple(mapped(value, name, change) for name, value in zip(named, args, strict=False))
    return new, {key: mapped(value, key, change) for key, value in kwargs.items()}
