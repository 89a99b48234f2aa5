"""Weights of the embedding and the head that code outside of the model's forward reads and mixes with plain tensors.

Losses that save memory never make the logits whole: they take the hidden states and multiply them, a part at a time,
with ``model.lm_head.weight``. Of a sharded model that is a DTensor, over the tensor-parallel ranks and, under FSDP2,
over the data-parallel ones too. What DTensor refuses to mix, a :class:`ReadableWeight` makes ready: the data-parallel
part is gathered, with a backward that averages the gradient over the ranks as FSDP2 does, and the tensor-parallel part
becomes a :class:`.ShardedTable`, whose product with hidden states is logits that stay sharded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from shardwright._torch import StridedShard, take_in_groups
from shardwright.distributed.runtime import collectives as c
from shardwright.distributed.runtime.checked import CheckedDTensor
from shardwright.distributed.runtime.dtypes import at_least_float32
from shardwright.distributed.runtime.implicit import ImplicitDTensor, OwnRules, refuse_address, tensors_in
from shardwright.distributed.runtime.layout import length_here
from shardwright.distributed.runtime.operations import writes
from shardwright.distributed.runtime.sharded_table import table_of
from shardwright.distributed.runtime.written import read_only, refuse_lost_write, sets_data

# The weight in another dtype or place: still one that may be mixed.
_SAME = """
    detach clone contiguous to type type_as float half bfloat16 double cpu cuda empty_like
"""
SAME = frozenset(_SAME.split())
# Views of it, which are made of what is gathered.
_VIEWS = """
    t transpose permute movedim adjoint __getitem__ narrow select split chunk unbind index_select
"""
VIEWS = frozenset(_VIEWS.split())
_VIEW_PROPERTIES = (Tensor.T.__get__, Tensor.mT.__get__)  # type: ignore[attr-defined]


class ReadableWeight(CheckedDTensor, OwnRules):
    """A parameter that may be mixed with plain tensors, which are equal on every tensor-parallel rank."""

    __slots__ = ()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        refuse_address(func, args)
        refuse_lost_write(func, args)
        mixed = any(_is_used_locally(x) for x in tensors_in((args, kwargs)))
        if func.__name__ in VIEWS or func in _VIEW_PROPERTIES:
            result = func(*_readable(args), **_readable(kwargs))
            return result if torch.is_grad_enabled() else read_only(result)
        if mixed and not (writes(func) or func is Tensor.__setitem__ or sets_data(func)):
            return func(*_readable(args), **_readable(kwargs))
        result = super().__torch_function__(func, types, args, kwargs)
        if isinstance(result, DTensor) and func.__name__ in SAME:
            return _mark(result, next(x for x in tensors_in((args, kwargs)) if isinstance(x, ReadableWeight)))
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        weight: Any = self
        weight.__class__ = DTensor  # whose clone is of its own class, which torch asks for
        try:
            return _mark(copy.deepcopy(weight, memo), self)
        finally:
            weight.__class__ = ReadableWeight


take_in_groups(ReadableWeight)


def make_readable(param: nn.Parameter, axis: str | None) -> None:
    """Let ``param``, a DTensor, be mixed with plain tensors, in place.

    Args:
        axis: the tensor-parallel axis of its mesh; None where it has none.
    """
    if type(param) is DTensor:
        param.__class__ = ReadableWeight
        param.__dict__["_tensor_parallel_axis"] = axis


def _is_used_locally(x: Tensor) -> bool:
    """Whether ``x`` is plain, or takes plain tensors for replicated ones; numbers may be mixed with anything."""
    return isinstance(x, ImplicitDTensor) or (not isinstance(x, DTensor) and x.ndim > 0)


def _mark(result: DTensor, weight: ReadableWeight) -> DTensor:
    result.__class__ = ReadableWeight
    result.__dict__["_tensor_parallel_axis"] = weight.__dict__["_tensor_parallel_axis"]
    return result


def _readable(value: Any) -> Any:
    if isinstance(value, ReadableWeight):
        return readable(value)
    if isinstance(value, dict):
        return {key: _readable(item) for key, item in value.items()}
    return type(value)(_readable(item) for item in value) if type(value) in (tuple, list) else value


def readable(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``weight`` for use with plain tensors: plain, or cut over the tensor-parallel ranks alone. Differentiable.

    Where data-parallel ranks hold parts of it, this is a collective among them, and so is its backward.

    Args:
        weight: a parameter or a form of one; what is no DTensor is returned as it is.
        dtype: to convert to, before anything is sent.
    """
    if not isinstance(weight, DTensor):
        return weight if dtype is None else weight.to(dtype)
    axis = _axis_of(weight)
    cuts = _data_parallel_cuts(weight, axis)
    local = weight.to_local()
    if cuts.size > 1:
        local = _OverDataParallel.apply(local, cuts, dtype or local.dtype)
    elif dtype is not None:
        local = local.to(dtype)
    if axis is None:
        return local
    mesh = weight.device_mesh[axis]
    placement = weight.placements[_names(weight.device_mesh).index(axis)]
    return table_of(local, placement, weight.shape, mesh)


def _axis_of(weight: DTensor) -> str | None:
    known = weight.__dict__.get("_tensor_parallel_axis", "tp")
    return known if known in _names(weight.device_mesh) else None


def _names(mesh: DeviceMesh) -> tuple[str, ...]:
    return mesh.mesh_dim_names or ()


@dataclass(frozen=True)
class _Cuts:
    """How the data-parallel ranks hold a weight.

    Attributes:
        shards: group, dim and whole length of every axis that shards it.
        replicas: the groups of every axis that does not.
    """

    shards: tuple[tuple[c.Group, int, int], ...]
    replicas: tuple[c.Group, ...]

    @property
    def size(self) -> int:
        return prod(group.size for group in (*(group for group, _, _ in self.shards), *self.replicas))


def _data_parallel_cuts(weight: DTensor, axis: str | None) -> _Cuts:
    mesh, shards, replicas = weight.device_mesh, [], []
    names = _names(mesh)
    for place, placement in enumerate(weight.placements):
        if names and names[place] == axis:
            continue
        group = c.Group.of(mesh[names[place]] if mesh.ndim > 1 else mesh)
        if isinstance(placement, (Shard, StridedShard)):
            shards.append((group, placement.dim, length_here(weight, place, placement.dim)))
        else:
            replicas.append(group)
    return _Cuts(tuple(shards), tuple(replicas))


class _OverDataParallel(torch.autograd.Function):
    """A weight's data-parallel shards put together; backward averages the gradient and takes this rank's shard."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, cuts: _Cuts, dtype: torch.dtype) -> Tensor:
        ctx.cuts, ctx.dtype = cuts, local.dtype
        whole = local.to(dtype)
        for group, dim, length in cuts.shards:
            whole = c.all_gather(whole, dim, length, group)
        return whole if cuts.shards else whole.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad.to(at_least_float32(grad.dtype))
        for group, dim, _ in reversed(ctx.cuts.shards):
            grad = c.reduce_scatter(grad, dim, group)
        for group in ctx.cuts.replicas:
            grad = c.all_reduce(grad, group)
        return (grad / ctx.cuts.size).to(ctx.dtype), None, None
