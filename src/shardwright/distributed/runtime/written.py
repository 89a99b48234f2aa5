"""Writes into sharded parameters and gradients from outside of the model: a row set to zero, a value copied in.

DTensor writes what fits the shards (``zero_``, ``mul_``, ``copy_`` of another DTensor). A part of the sharded dim it
copies first, so that ``weight[0].zero_()`` writes into a copy and nothing is changed, without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from shardwright._torch import StridedShard, without_torch_function
from shardwright.distributed.runtime.implicit import joined, tensors_in
from shardwright.distributed.runtime.layout import part_of, whole
from shardwright.distributed.runtime.operations import writes
from shardwright.errors import UnsupportedError

# What hands out a tensor's own memory on one process.
_NAMES = """
    __getitem__ select narrow split split_with_sizes tensor_split hsplit vsplit chunk unbind view view_as reshape
    reshape_as flatten unflatten squeeze unsqueeze transpose permute movedim swapaxes swapdims expand expand_as t
    adjoint detach diagonal unfold alias
"""
_ALIASES = frozenset(_NAMES.split())
_SETS_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_ALIAS_PROPERTIES = tuple(getattr(Tensor, name).__get__ for name in ("data", "T", "mT", "H", "mH"))


def is_alias(func: Callable[..., Any]) -> bool:
    return func.__name__ in _ALIASES or func in _ALIAS_PROPERTIES


def note_copies(results: Any, source: Tensor) -> None:
    """Note on ``results``, which share memory with ``source`` on one process, that they are copies, where they are."""
    for result in results if isinstance(results, (tuple, list)) else (results,):
        if not (isinstance(result, DTensor) and isinstance(source, DTensor)):
            continue
        if "_is_copy" in source.__dict__ or _cuts(result) < _cuts(source):
            result.__dict__["_is_copy"] = True


def _cuts(x: DTensor) -> set[int]:
    """The axes of the mesh that cut ``x``."""
    sharded = (axis for axis, placement in enumerate(x.placements) if isinstance(placement, (Shard, StridedShard)))
    return {axis for axis in sharded if x.device_mesh.size(axis) > 1}


def refuse_lost_write(func: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Raise UnsupportedError where ``func`` writes into a copy of what its caller takes for a part of a parameter."""
    if not args or not (writes(func) or func is Tensor.__setitem__):
        return  # torch.nn.init names its arguments
    written = args[0]
    if isinstance(written, Tensor) and "_is_copy" in written.__dict__:
        raise UnsupportedError(
            f"{func.__name__} writes into a part of shape {tuple(written.shape)} of a sharded parameter or gradient. "
            "Parts along the sharded dim are copies, so nothing would be changed. Assign to the part instead, on every "
            "rank, under torch.no_grad(): weight[rows] = values (and weight[rows] = weight[rows] + 1 for +=)."
        )


def is_whole_write(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether ``func`` writes a part, or plain tensors, into a DTensor of which no graph needs to know."""
    assigns = func is Tensor.__setitem__
    if not (assigns or writes(func)) or not isinstance(args[0], DTensor):
        return False
    if torch.is_grad_enabled() and args[0].requires_grad:
        return False
    return assigns or any(x.ndim > 0 and not isinstance(x, DTensor) for x in tensors_in((args[1:], kwargs)))


def write_whole(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let ``func`` write into the whole tensor, and keep this rank's part; ranks with the same part get the first's."""
    written, *others = args
    with torch.no_grad():
        new = whole(written).clone()
        func(new, *joined(others), **joined(kwargs))
        _keep_part(new, written)
    return None if func is Tensor.__setitem__ else written


def _keep_part(new: Tensor, written: DTensor) -> None:
    local = part_of(new, written).contiguous()
    mesh = written.device_mesh
    for axis, placement in enumerate(written.placements):
        if placement.is_replicate() and mesh.size(axis) > 1:
            dist.broadcast(local, group=mesh.get_group(axis), group_src=0)
    written.to_local().copy_(local)


def sets_data(func: Callable[..., Any]) -> bool:
    """Whether ``func`` is the assignment ``tensor.data = value``."""
    return func == _SETS_DATA


@torch.no_grad()
def set_data(written: DTensor, value: Tensor) -> None:
    """``written.data = value``: the values go into the shards, where DTensor would lose them without a word.

    Raises:
        UnsupportedError: the value has another shape, dtype or kind of device, which would change the parameter itself.
    """
    here, there = ((x.dtype, tuple(x.shape), x.device.type) for x in (written, value))
    if here != there:
        raise UnsupportedError(
            f"A sharded parameter ({', '.join(map(str, here))}) cannot become another by .data = ... "
            f"({', '.join(map(str, there))}). Change the model before parallelize; ParallelConfig(precision=...) "
            "computes in another dtype."
        )
    if not isinstance(value, DTensor):
        _keep_part(value, written)
    elif value.device_mesh == written.device_mesh and value.placements == written.placements:
        written.to_local().copy_(value.to_local())
    else:
        written.to_local().copy_(part_of(whole(value), written))


class ReadOnly(Tensor):
    """A copy of a part of a parameter, whole on every rank, that refuses to be written to."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not all(issubclass(kind, (cls, torch.nn.Parameter)) or kind is Tensor for kind in types):
            return NotImplemented
        refuse_lost_write(func, args)
        with without_torch_function():
            result = func(*args, **(kwargs or {}))
        return read_only(result) if is_alias(func) else result


def read_only(results: Any) -> Any:
    """``results``, plain or sharded, as tensors that refuse to be written to."""
    if isinstance(results, (tuple, list)):
        return type(results)(read_only(result) for result in results)
    if type(results) is Tensor:
        results = results.as_subclass(ReadOnly)
    if isinstance(results, Tensor):
        results.__dict__["_is_copy"] = True
    return results
