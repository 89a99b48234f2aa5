"""Sizes that a module's code reads from its attributes, as this rank's while its forward runs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from shardwright.distributed.runtime.forward import Around, Forward, attributes_as

CONFIG = "config."


class LocalConfig:
    """A config with some values of its own; everything else is read from the shared one, which stays untouched."""

    def __init__(self, shared: Any, own: dict[str, int]) -> None:
        self.__dict__.update(own)
        self.__dict__["_shared"] = shared

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_shared"], name)


class LocalAttributes(Around):
    """Run a module with rank-local values of some of its attributes; ``config.<name>`` stands for its config's."""

    def __init__(self, values: dict[str, int]) -> None:
        self.own = {name: value for name, value in values.items() if not name.startswith(CONFIG)}
        self.config = {name[len(CONFIG) :]: value for name, value in values.items() if name.startswith(CONFIG)}

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.on(module):
            return forward(*args, **kwargs)

    def on(self, module: nn.Module) -> AbstractContextManager[None]:
        """``module`` has the values inside."""
        values: dict[str, Any] = dict(self.own)
        if self.config:
            values["config"] = LocalConfig(module.__dict__["config"], self.config)
        return attributes_as(module, values)
