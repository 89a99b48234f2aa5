"""Rank-local views of the integers that a module's code reads as sizes.

A size may be an attribute of the module itself (``num_heads``) or of its config (``config.num_heads``). The config is
shared by the whole model, so the module gets a *view* of it: an object of a subclass with the same state (the very same
``__dict__``), which answers with the local number for the names that are local, and is the shared config for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from torch import Tensor, nn

_PRIMITIVES = (int, float, str, bytes, tuple, list, dict, set, frozenset, type(None), type, Tensor, nn.Module)


def local_values(module: nn.Module, attributes: Iterable[str], size: int) -> dict[str, Any]:
    """What to put into ``module.__dict__`` so that ``attributes`` (``num_heads``, ``config.num_heads``) are local.

    Args:
        size: number of ranks; every value is divided by it.

    Raises:
        ValueError: an attribute is missing, not an integer, or not a multiple of ``size``.
    """
    result: dict[str, Any] = {}
    inside: dict[str, list[str]] = {}
    for attribute in attributes:
        holder, _, key = attribute.rpartition(".")
        owner = module.__dict__.get(holder) if holder else module
        value = vars(module).get(key) if not holder else getattr(owner, key, None)
        if type(value) is not int or value % size:
            raise ValueError(f"{attribute} is {value!r}; it must be a whole number that {size} ranks divide.")
        if holder:
            inside.setdefault(holder, []).append(key)
        else:
            result[key] = value // size
    for holder, keys in inside.items():
        result[holder] = divided_view(module.__dict__[holder], frozenset(keys), size)
    return result


def divided_view(config: Any, names: frozenset[str], size: int) -> Any:
    """``config`` as it is, except that the integers in ``names`` read as divided by ``size``."""
    cls: Any = type(config)
    view: Any = object.__new__(_divided(cls, names, size))
    object.__setattr__(view, "__dict__", vars(config))
    return view


@cache
def _divided(cls: Any, names: frozenset[str], size: int) -> type:
    def getattribute(self: Any, key: str) -> Any:
        value = cls.__getattribute__(self, key)
        return value // size if key in names else value

    def reduce(self: Any, protocol: Any) -> Any:
        return _rebuild, (cls, names, size), vars(self)

    return type(
        cls.__name__, (cls,), {"__getattribute__": getattribute, "__reduce_ex__": reduce, "__module__": cls.__module__}
    )


def _rebuild(cls: type, names: frozenset[str], size: int) -> Any:
    return object.__new__(_divided(cls, names, size))


def is_config(value: Any) -> bool:
    """Whether an attribute of a module is an object that may hold sizes, and that a view can stand for."""
    return not isinstance(value, _PRIMITIVES) and not callable(value) and hasattr(value, "__dict__")


def watched_view(config: Any, note: Callable[[str, int], None]) -> Any:
    """``config`` as it is, telling ``note`` of every integer that is read from it."""
    cls: Any = type(config)

    def getattribute(self: Any, key: str) -> Any:
        value = cls.__getattribute__(self, key)
        if type(value) is int:
            note(key, value)
        return value

    view: Any = object.__new__(
        type(cls.__name__, (cls,), {"__getattribute__": getattribute, "__module__": cls.__module__})
    )
    object.__setattr__(view, "__dict__", vars(config))
    return view
