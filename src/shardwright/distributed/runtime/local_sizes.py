"""Sizes that a module's code reads from its attributes, as this rank's while its forward runs.

A size may be an attribute of the module itself (``num_heads``) or of an object that it holds (``config.num_heads``).
A config is shared by the whole model, so the module gets a *view* of it: an object of a subclass with the same state
(the very same ``__dict__``), whose class answers for the names that are local. So a property of the config that
computes something from such a size (``all_head_size``) sees this rank's, too, and the shared config is not changed.

The run and the replay use this one implementation.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cache
from operator import itemgetter
from typing import Any

from torch import nn

from shardwright.distributed.runtime.forward import Around, Forward, attributes_as


class LocalSizes(Around):
    """Run a module with rank-local values of some of its attributes.

    Args:
        module: the module; its configs are looked at now, so that ``torch.compile`` finds the views made.
        values: attribute (``num_heads``, or ``config.num_heads``) -> its value inside.
    """

    def __init__(self, module: nn.Module, values: Mapping[str, int | str]) -> None:
        self.own = {name: value for name, value in values.items() if "." not in name}
        self.held: dict[str, dict[str, int | str]] = {}
        for name, value in values.items():
            holder, _, key = name.rpartition(".")
            if holder:
                self.held.setdefault(holder, {})[key] = value
        self._views: dict[str, tuple[Any, Any]] = {}  # holder -> what is shared, the view of it
        self._look(module)

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.on(module):
            return forward(*args, **kwargs)

    def on(self, module: nn.Module) -> AbstractContextManager[None]:
        """``module`` has the values inside."""
        if any(self._views[holder][0] is not module.__dict__[holder] for holder in self.held):
            self._look(module)  # a copy of the model, or another config since
        return attributes_as(module, {**self.own, **{holder: view for holder, (_, view) in self._views.items()}})

    def _look(self, module: nn.Module) -> None:
        for holder, values in self.held.items():
            shared = module.__dict__[holder]
            self._views[holder] = shared, local_view(shared, values)

    def __deepcopy__(self, memo: dict[int, Any]) -> LocalSizes:
        copied = object.__new__(LocalSizes)
        copied.own, copied.held = self.own, self.held
        copied._views = dict.fromkeys(self.held, (None, None))
        return copied

    def __reduce__(self) -> Any:
        return _unpickled, (self.own, self.held)


def _unpickled(own: dict[str, Any], held: dict[str, dict[str, int | str]]) -> LocalSizes:
    made = object.__new__(LocalSizes)
    made.own, made.held = own, held
    made._views = dict.fromkeys(held, (None, None))
    return made


def local_view(shared: Any, values: Mapping[str, int | str]) -> Any:
    """``shared`` as it is, except that the attributes in ``values`` have these values.

    Properties of a subclass win over what lies in ``__dict__``, which is why nothing is written there. transformers'
    configs give some attributes two names (``attribute_map``); both are local.
    """
    cls: Any = type(shared)
    aliases = getattr(shared, "attribute_map", {})
    local = ((aliases.get(name, name), type(value), value) for name, value in values.items())
    view: Any = object.__new__(_answering(cls, *sorted(local, key=itemgetter(0))))
    object.__setattr__(view, "__dict__", vars(shared))
    return view


@cache
def _answering(cls: Any, *local: tuple[str, type, int | str]) -> Any:
    """A class like ``cls`` whose objects answer so, made once: transformers makes a dataclass of every config.

    Types are a part of the key, for 1 and True are equal.
    """
    properties = {name: property(_constant(value)) for name, _, value in local}
    return type(cls.__name__, (cls,), {**properties, "__module__": cls.__module__})


def _constant(value: int | str) -> Any:
    return lambda self: value
