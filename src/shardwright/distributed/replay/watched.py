"""A config that tells which of its integers are read: these may be sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

_PRIMITIVES = (int, float, str, bytes, tuple, list, dict, set, frozenset, type(None), type, Tensor, nn.Module)


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
