"""A config that tells which of its integers are read: these may be sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor, nn

Note = Callable[[str, int], None]
_NOTE = "_shardwright_note"
_PRIMITIVES = (int, float, str, bytes, tuple, list, dict, set, frozenset, type(None), type, Tensor, nn.Module)


def is_config(value: Any) -> bool:
    """Whether an attribute of a module is an object that may hold sizes, and that a view can stand for."""
    return not isinstance(value, _PRIMITIVES) and not callable(value) and hasattr(value, "__dict__")


def watched_view(config: Any, note: Note) -> Any:
    """``config`` as it is, telling ``note`` of every integer that is read from it."""
    cls: Any = type(config)
    view = object.__new__(_telling(cls))
    object.__setattr__(view, "__dict__", vars(config))
    object.__setattr__(view, _NOTE, note)
    return view


@cache
def _telling(cls: Any) -> Any:
    """A class like ``cls`` whose objects have a note. Made once: transformers makes a dataclass of every config."""

    def getattribute(self: Any, key: str) -> Any:
        value = cls.__getattribute__(self, key)
        if type(value) is int:
            object.__getattribute__(self, _NOTE)(key, value)
        return value

    # The slot keeps the note out of the view's dict, which is that of the config.
    return type(
        cls.__name__, (cls,), {"__slots__": (_NOTE,), "__getattribute__": getattribute, "__module__": cls.__module__}
    )
