"""Reference code of state-space layers and of linear attention works on the sequence in chunks, and pads it to them.

A trial has a handful of tokens. Chunks of 64 or 256 make its tensors thousands of times larger than they need to be,
and planning Falcon-H1 or Kimi Linear takes minutes. The size of a chunk changes no result: that it does not is checked
for every model, not believed.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

NAME = "chunk_size"  # of a module's attribute, or of an argument of a function beside its class
SHORT = 4  # shorter than a trial's sequence, so that more than one chunk takes part


@dataclass
class Chunks:
    """The chunks that a model's code works in.

    Attributes:
        modules: modules that state a size as an attribute, with that size.
        functions: functions that take one and have a default, with all of their defaults.
    """

    modules: dict[nn.Module, int] = field(default_factory=dict)
    functions: dict[Callable[..., Any], tuple[Any, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> Chunks:
        """The chunks in ``model`` that are longer than a trial needs."""
        sizes = {module: module.__dict__.get(NAME) for module in model.modules()}
        modules = {module: size for module, size in sizes.items() if type(size) is int and size > SHORT}
        homes = {cls.__module__ for module in model.modules() for cls in type(module).__mro__}
        values = [value for home in homes for value in vars(sys.modules[home]).values() if home != nn.__name__]
        functions = {inspect.unwrap(value) for value in values if inspect.isfunction(value)}
        return cls(modules, {each: each.__defaults__ for each in functions if _default(each) > SHORT})

    def __bool__(self) -> bool:
        return bool(self.modules or self.functions)

    @contextmanager
    def shortened(self) -> Iterator[None]:
        """All of them are short inside. Defaults of functions are those of the process: planning is not for threads."""
        for module in self.modules:
            module.__dict__[NAME] = SHORT
        for function, defaults in self.functions.items():
            function.__defaults__ = _with_default(function, defaults)
        try:
            yield
        finally:
            for module, size in self.modules.items():
                module.__dict__[NAME] = size
            for function, defaults in self.functions.items():
                function.__defaults__ = defaults


def _default(function: Callable[..., Any]) -> int:
    parameter = inspect.signature(function).parameters.get(NAME)
    if parameter is None or parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
        return 0
    return parameter.default if type(parameter.default) is int else 0


def _with_default(function: Callable[..., Any], defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    parameters = inspect.signature(function).parameters.values()
    names = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD][-len(defaults) :]
    return tuple(SHORT if name == NAME else value for name, value in zip(names, defaults, strict=True))
