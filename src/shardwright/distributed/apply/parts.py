"""A sharded model for losses that are computed outside of its forward: its parts can be called, its head can be read.

A loss that never makes whole logits takes the hidden states of ``model.model(...)`` and multiplies them with the head's
weight, or calls the head, a part of the sequence at a time. Under FSDP2 the embedding, the last norm and the head are
in the root's unit, which is gathered around the root's forward. So a part that is called by itself is called through
the root: FSDP2 sees a forward of the root, and what runs in it is the part's.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from shardwright.distributed.runtime.forward import Around, Forward, arounds, run_in, wrap_forward
from shardwright.distributed.runtime.gradient_sum import UnitParameters
from shardwright.distributed.runtime.read_weights import make_readable

PART = "shardwright_part"  # the argument by which the root is told to run a part in the place of itself


def open_to_losses(model: nn.Module, readable: Iterable[str], axis: str, *, fsdp2: bool) -> None:
    """Let weights be mixed with plain tensors, and parts of the model be called alone, in place.

    Args:
        readable: modules whose weights losses read: the embedding and the head.
        axis: what the mesh calls its tensor-parallel axis.
        fsdp2: ``model`` is the root of FSDP2's units.
    """
    root = _Root(tuple(readable), axis)
    root.make_readable(model)
    if fsdp2:
        wrap_forward(model, root)
        for module in _outside_units(model):
            if module is not model and any(True for _ in module.parameters()):
                wrap_forward(module, _Part(model, root))


class _Root(Around):
    def __init__(self, names: tuple[str, ...], axis: str) -> None:
        self.names, self.axis = names, axis
        self.running = False

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        outer, self.running = self.running, True
        self.make_readable(module)  # what FSDP2 has gathered, and registered in the place of the shards
        try:
            if PART not in kwargs:
                return forward(*args, **kwargs)
            return _run_part(module, args, **kwargs)
        finally:
            self.running = outer

    def make_readable(self, model: nn.Module) -> None:
        for name in self.names:
            for param in model.get_submodule(name).parameters():
                if isinstance(param, DTensor):
                    make_readable(param, self.axis)


def _run_part(root: nn.Module, args: tuple[Any, ...], shardwright_part: Forward, **kwargs: Any) -> Any:
    """The part's forward, while the root's whole parameters are local."""
    run = shardwright_part
    for around in arounds(root):
        if isinstance(around, UnitParameters):
            run = partial(_around, around, root, run)
    return run(*args, **kwargs)


def _around(around: Around, module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
    return around(module, forward, args, kwargs)


class _Part(Around):
    eager = True

    def __init__(self, model: nn.Module, root: _Root) -> None:
        self.model, self.root = weakref.ref(model), root

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        model = None if self.root.running else self.model()
        return forward(*args, **kwargs) if model is None else model(*args, **kwargs, **{PART: forward})


def stand_for(root: nn.Module, found: nn.Module) -> None:
    """Let ``found``, the only thing in ``root`` that is still used, be called in the place of ``root``, in place."""
    once = _Once()
    wrap_forward(found, _AsRoot(root, once))
    wrap_forward(root, once)


class _Once(Around):
    """Knows whether the root runs."""

    def __init__(self) -> None:
        self.running = False

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        outer, self.running = self.running, True
        try:
            return forward(*args, **kwargs)
        finally:
            self.running = outer


class _AsRoot(Around):
    """Does around a part what the root does around itself; keeps the root, whose hooks gather for FSDP2."""

    eager = True

    def __init__(self, root: nn.Module, once: _Once) -> None:
        self.root, self.once = root, once

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.once.running:
            return forward(*args, **kwargs)
        self.root.training = module.training
        chain = [each for each in arounds(self.root) if each is not self.once]
        if any(isinstance(each, _Root) for each in chain):  # FSDP2: the part will go through the root by itself
            chain = [each for each in chain if not isinstance(each, (_Root, UnitParameters))]
        return run_in(self.root, tuple(chain), forward, args, kwargs)


def _outside_units(module: nn.Module) -> Iterator[nn.Module]:
    """``module`` and what is below it down to, and without, the FSDP2 units inside it; lists are never called."""
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        yield module
    for child in module.children():
        if not isinstance(child, FSDPModule):
            yield from _outside_units(child)
