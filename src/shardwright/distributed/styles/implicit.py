"""DTensors that model code and loss code can mix with plain tensors.

Outside of the blocks a sharded model hands its own Python code a DTensor: the residual stream split along the sequence,
or logits split on the vocabulary. That code does not know, and mixes it with plain tensors, which are equal on every
rank. DTensor refuses that; these classes take a plain tensor for a replicated one (its gradient is made whole again by
``DTensor.from_local``), and hand out a plain tensor again where a result is no longer sharded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

T = TypeVar("T", bound="ImplicitDTensor")


class ImplicitDTensor(DTensor):
    """A DTensor whose operations accept plain tensors as replicated ones."""

    __slots__ = ()

    @classmethod
    def keeps(cls, x: DTensor) -> bool:
        """Whether a result stays of this class; otherwise it is made whole and plain."""
        return any(not placement.is_replicate() and not placement.is_partial() for placement in x.placements)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors((args, kwargs))
        mesh = next(x.device_mesh for x in tensors if isinstance(x, ImplicitDTensor))
        with torch._C.DisableTorchFunctionSubclass():
            if all(isinstance(x, DTensor) for x in tensors):
                return cls._returned(func(*args, **kwargs))
            return cls._returned(func(*_distributed(args, mesh), **_distributed(kwargs, mesh)))

    @classmethod
    def _returned(cls, value: Any) -> Any:
        if isinstance(value, DTensor):
            return mark(value, cls) if cls.keeps(value) else value.full_tensor()
        if type(value) in (tuple, list):
            return type(value)(cls._returned(item) for item in value)
        if isinstance(value, tuple) and any(isinstance(item, DTensor) for item in value):  # such as torch.max's
            return type(value)([cls._returned(item) for item in value])
        return value


def mark(x: DTensor, cls: type[T]) -> T:
    """``x`` itself as one of ``cls``.

    The class is changed rather than a copy made, so the tensor keeps its place in the autograd graph; the classes have
    the same layout.
    """
    x.__class__ = cls
    return x  # type: ignore[return-value]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [x for item in value for x in _tensors(item)]


def _distributed(value: Any, mesh: DeviceMesh) -> Any:
    if isinstance(value, Tensor) and not isinstance(value, DTensor):
        return DTensor.from_local(value, mesh, [Replicate()], run_check=False)
    if isinstance(value, dict):
        return {key: _distributed(item, mesh) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_distributed(item, mesh) for item in value)
    return value
