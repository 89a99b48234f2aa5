"""What a full run learns of the modules' code beside the tensors: the arguments it gets, the integers it reads."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shardwright._torch import tree_leaves
from shardwright.distributed.replay.watched import is_config, watched_view


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
    return inspect.signature(module.forward).bind(*args, **kwargs)


@contextmanager
def listening(
    model: nn.Module, found: dict[str, dict[str, torch.Size]], first: dict[str, tuple[str, int]]
) -> Iterator[None]:
    """Note the tensor arguments of every module that need no gradient, and the first one that needs one."""
    hooks = []
    for name, module in model.named_modules():

        def hook(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            try:
                bound = bind(module, args, kwargs)
            except TypeError:
                return
            for key, value in bound.arguments.items():
                if isinstance(value, Tensor) and value.requires_grad and value.ndim > 1:
                    first.setdefault(name, (key, value.shape[-1]))
            tensors = dict(bound.arguments)
            tensors |= tensors.pop("kwargs", {})
            shapes = found.setdefault(name, {})
            for key, value in tensors.items():
                if isinstance(value, Tensor) and not value.requires_grad and value.ndim > 1:
                    shapes[key] = value.shape

        hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def computed_with(result: Any, *arguments: Any) -> list[nn.Parameter]:
    """The parameters among a call's ``arguments``; none where only their shape or dtype was asked for."""
    if not any(isinstance(value, Tensor) for value in tree_leaves(result)):
        return []
    return [value for value in tree_leaves(arguments) if isinstance(value, nn.Parameter)]


class Touched(TorchFunctionMode):
    """Notes which of some modules have parameters that other code than their own forward computes with.

    With or without a gradient: DoRA's norm of a frozen weight has none. Shapes and dtypes may be asked for.

    Attributes:
        names: of these modules.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.names: set[str] = set()
        self._owners: dict[int, list[str]] = {}
        for name, module in modules.items():
            for param in module._parameters.values():
                self._owners.setdefault(id(param), []).append(name)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for param in computed_with(result, args, kwargs):
            self.names.update(self._owners.get(id(param), ()))
        return result


@contextmanager
def reading(model: nn.Module, reads: dict[tuple[str, str], int]) -> Iterator[None]:
    """Note which integers every module reads from its attributes and its config."""
    undo: list[Callable[[], Any]] = []
    for name, module in model.named_modules():
        own = module.__dict__
        for holder, config in [(k, v) for k, v in own.items() if is_config(v)]:

            def note(key: str, value: int, name: str = name, holder: str = holder) -> None:
                reads.setdefault((name, f"{holder}.{key}"), value)

            undo.append(partial(own.__setitem__, holder, config))
            own[holder] = watched_view(config, note)
        undo += [partial(setattr, module, "__class__", type(module)), partial(own.pop, "_on_read")]
        own["_on_read"] = lambda key, value, name=name: reads.setdefault((name, key), value)
        cls: Any = type(module)
        module.__class__ = _reader(cls)
    try:
        yield
    finally:
        for restore in undo:
            restore()


@cache
def _reader(cls: type[nn.Module]) -> type[nn.Module]:
    def getattribute(self: nn.Module, key: str) -> Any:
        value = cls.__getattribute__(self, key)
        if type(value) is int and key in self.__dict__:
            self.__dict__["_on_read"](key, value)
        return value

    return type(cls.__name__, (cls,), {"__getattribute__": getattribute, "__module__": cls.__module__})
