"""DTensors that model code and loss code can mix with plain tensors.

Outside of the blocks a sharded model hands its own Python code a DTensor: the residual stream split along the sequence,
or logits split on the vocabulary. That code does not know, and mixes it with plain tensors, which are equal on every
rank. DTensor refuses that; these classes take a plain tensor for a replicated one (its gradient is made whole again by
``DTensor.from_local``), and hand out a plain tensor again where a result is no longer sharded. What DTensor has no rule
for, or one that is not known to be right (:mod:`.operations`), is computed on whole tensors, alike on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from shardwright._torch import without_torch_function
from shardwright.distributed.runtime.dtypes import HALF, result_dtype
from shardwright.distributed.runtime.operations import DRAWS, REDUCED_IN_FLOAT32, is_known, writes
from shardwright.distributed.runtime.random_states import drawing_alike
from shardwright.errors import UnsupportedError

T = TypeVar("T", bound="ImplicitDTensor")


class OwnRules(DTensor):
    """A DTensor whose class is asked before any :class:`ImplicitDTensor` that it is mixed with."""

    __slots__ = ()


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
        refuse_address(func, args)
        if not issubclass(cls, OwnRules) and any(issubclass(kind, OwnRules) for kind in types):
            return NotImplemented  # torch asks that class next
        if func is Tensor.__setitem__:
            return _set_items(*args)
        if not is_known(func):
            return _on_whole(func, args, kwargs)
        if func.__name__ in REDUCED_IN_FLOAT32 and args[0].dtype in HALF and kwargs.get("dtype") is None:
            return func(args[0].float(), *args[1:], **kwargs).to(result_dtype(func, args[0]))
        tensors = tensors_in((args, kwargs))
        mesh = next(x.device_mesh for x in tensors if isinstance(x, ImplicitDTensor))
        with without_torch_function():
            try:
                if all(isinstance(x, DTensor) for x in tensors):
                    return cls._returned(func(*args, **kwargs))
                return cls._returned(func(*_distributed(args, mesh), **_distributed(kwargs, mesh)))
            except NotImplementedError:  # DTensor has no rule for this operation
                return _on_whole(func, args, kwargs)

    @classmethod
    def _returned(cls, value: Any) -> Any:
        if isinstance(value, DTensor):
            return mark(value, cls) if cls.keeps(value) else value.full_tensor()
        if type(value) in (tuple, list):
            return type(value)(cls._returned(item) for item in value)
        if isinstance(value, tuple) and any(isinstance(item, DTensor) for item in value):  # such as torch.max's
            return type(value)([cls._returned(item) for item in value])
        return value


def refuse_address(func: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Raise UnsupportedError where ``func`` asks for the memory of a tensor of which this rank has a part."""
    if func is Tensor.data_ptr and isinstance(args[0], DTensor):
        raise UnsupportedError(
            f"A kernel asks for the memory of a tensor of shape {tuple(args[0].shape)}. This rank has a part of it, "
            "and kernels that are written by hand (those of Liger or cut_cross_entropy) know of one rank's memory. For "
            "a loss that never makes whole logits, set loss_tiles in ParallelConfig, or call "
            "shardwright.losses.linear_cross_entropy; out.logits.full_tensor() are whole logits."
        )


def mark(x: DTensor, cls: type[T]) -> T:
    """``x`` itself as one of ``cls``.

    The class is changed rather than a copy made, so the tensor keeps its place in the autograd graph; the classes have
    the same layout.
    """
    x.__class__ = cls
    return x  # type: ignore[return-value]


def _on_whole(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func`` on whole tensors, which every rank computes alike; what it writes goes back into the shards."""
    if func.__name__ in DRAWS:
        mesh = next(x.device_mesh for x in tensors_in((args, kwargs)) if isinstance(x, ImplicitDTensor))
        with drawing_alike(mesh):
            return _same_on_whole(func, args, kwargs)
    return _same_on_whole(func, args, kwargs)


def _same_on_whole(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not (writes(func) and isinstance(args[0], DTensor)):
        return func(*joined(args), **joined(kwargs))
    x, *others = args
    new = x.full_tensor().clone()
    func(new, *joined(others), **joined(kwargs))
    return x.copy_(new)


def _set_items(x: Tensor, index: Any, value: Any) -> None:
    """``x[index] = value``, which DTensor cannot do where the index lies along the sharded dim: by a mask instead."""
    index, value = joined(index), joined(value)
    if not isinstance(x, ImplicitDTensor):
        x[index] = value
        return
    items = index if isinstance(index, tuple) else (index,)
    leading = next((n for n, item in enumerate(items) if not (isinstance(item, slice) and item == slice(None))), 0)
    # Along the leading dims that are written in full the mask is broadcast: [vocabulary] is enough for columns.
    mask = torch.zeros(x.shape[leading:], dtype=torch.bool, device=x.device)
    mask[items[leading:]] = True
    if not isinstance(value, Tensor):
        x.masked_fill_(mask, value)
        return
    new = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    new[index] = value.to(x.dtype)
    x.copy_(torch.where(mask, new, x))


def joined(value: Any) -> Any:
    """``value`` with every DTensor in it made whole, in one piece of memory as on one process (``view`` needs that)."""
    if isinstance(value, DTensor):
        return value.full_tensor().contiguous()
    if isinstance(value, dict):
        return {key: joined(item) for key, item in value.items()}
    return type(value)(joined(item) for item in value) if type(value) in (tuple, list) else value


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in an argument of a function, or in its arguments."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [x for item in value for x in tensors_in(item)]


def _distributed(value: Any, mesh: DeviceMesh) -> Any:
    if isinstance(value, Tensor) and not isinstance(value, DTensor):
        return DTensor.from_local(value, mesh, [Replicate()], run_check=False)
    if isinstance(value, dict):
        return {key: _distributed(item, mesh) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_distributed(item, mesh) for item in value)
    return value
