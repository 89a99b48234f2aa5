"""Shards of experts that may stand in one list, and in one sum, with shards on another mesh.

Experts lie on ``efsdp x ep``, all other parameters on ``dp_shard_cp x tp``: two views of the same ranks. DTensor
refuses to mix meshes. Stock code does so in two places: ``clip_grad_norm_`` puts the norms of all gradients together
and multiplies each gradient by one number, and optimizers update many tensors in one call. An :class:`ExpertTensor`
hands out its norm on the mesh of the others (every rank holds the norm of its own shard, whatever the mesh is called),
takes their numbers, and is updated in a call of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from shardwright._torch import foreach_norm, part_of_norm, take_in_groups
from shardwright.distributed.runtime.checked import CheckedDTensor, checked
from shardwright.distributed.runtime.implicit import OwnRules

_NORMS = {torch.linalg.vector_norm: "ord", torch.linalg.norm: "ord", torch.norm: "p", Tensor.norm: "p"}


class ExpertTensor(CheckedDTensor, OwnRules):
    """A shard of experts, its gradient, or what an optimizer keeps for it."""

    __slots__ = ()
    goes_first = True  # it knows of the other mesh

    @classmethod
    def computed(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func.__name__.startswith(("_foreach_", "_fused_")):
            return _by_mesh(func, args, kwargs)
        order = args[1] if len(args) > 1 else kwargs.get(_NORMS.get(func, ""), 2)
        if func in _NORMS and len(args) <= 2 and not {"dim", "dtype", "keepdim"} & set(kwargs):
            return checked(_norm(args[0], 2 if order in ("fro", None) else order))
        first = next(x for x in _flat((args, kwargs)) if isinstance(x, ExpertTensor))
        return checked(_mark(func(*_here(args, first), **_here(kwargs, first)), first))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        tensor: Any = self
        tensor.__class__ = DTensor  # whose clone is of its own class, which torch asks for
        try:
            return mix_with(_others_mesh(self), copy.deepcopy(tensor, memo))
        finally:
            tensor.__class__ = ExpertTensor


take_in_groups(ExpertTensor)


def mix_with(mesh: DeviceMesh, tensor: Tensor) -> Tensor:
    """Let ``tensor``, a DTensor, stand together with those on ``mesh``, which has the same ranks; in place."""
    if type(tensor) is DTensor:
        tensor.__class__ = ExpertTensor
        tensor.__dict__["_others_mesh"] = mesh
    return tensor


def _others_mesh(tensor: Tensor) -> DeviceMesh:
    mesh: DeviceMesh = tensor.__dict__["_others_mesh"]
    return mesh


def _flat(value: Any) -> list[Any]:
    """What stands in ``value``, and in the lists, tuples and dicts of it."""
    if isinstance(value, dict):
        return _flat(list(value.values()))
    if isinstance(value, (list, tuple)):
        return [item for each in value for item in _flat(each)]
    return [value]


def _here(value: Any, tensor: ExpertTensor) -> Any:
    """``value`` with the numbers that lie on another mesh than ``tensor`` brought to its own."""
    if isinstance(value, DTensor) and value.ndim == 0 and value.device_mesh != tensor.device_mesh:
        mesh = tensor.device_mesh
        return DTensor.from_local(value.full_tensor(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    if isinstance(value, dict):
        return {key: _here(item, tensor) for key, item in value.items()}
    return type(value)(_here(item, tensor) for item in value) if type(value) in (tuple, list) else value


def _mark(result: Any, like: ExpertTensor) -> Any:
    """Whatever of ``result`` is a shard on the mesh of ``like``, as one of this class."""
    if type(result) in (tuple, list):
        return type(result)(_mark(item, like) for item in result)
    if type(result) is DTensor and result.ndim > 0 and result.device_mesh == like.device_mesh:
        return mix_with(_others_mesh(like), result)
    return result


def _norm(tensor: ExpertTensor, order: float) -> DTensor:
    local, mesh = tensor.to_local(), _others_mesh(tensor)
    own = torch.linalg.vector_norm(local, order) if local.numel() else local.new_zeros(())
    replicas = len(tensor.placements) - 2  # behind these come the two axes that shard
    placements = [Replicate()] * replicas + [part_of_norm(order)] * (mesh.ndim - replicas)
    return DTensor.from_local(own, mesh, placements, run_check=False)


def _by_mesh(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function of lists of tensors, called for the shards of experts and for all others."""
    lists = [value for value in (*args, *kwargs.values()) if isinstance(value, (list, tuple))]
    count = len(lists[0])
    experts = [any(isinstance(each[n], ExpertTensor) for each in lists if len(each) == count) for n in range(count)]
    results: list[Any] = [None] * count
    for own in (True, False):
        places = [n for n in range(count) if experts[n] is own]
        if not places:
            continue
        chosen, named = _chosen(args, places, count), _chosen(kwargs, places, count)
        if own and func is foreach_norm:
            order = args[1] if len(args) > 1 else kwargs.get("ord", 2)
            found: Sequence[Any] | None = [_norm(tensor, order) for tensor in chosen[0]]
        elif own:
            first = next(x for x in _flat((chosen, named)) if isinstance(x, ExpertTensor))
            found = _mark(func(*_here(chosen, first), **_here(named, first)), first)
        else:
            found = func(*chosen, **named)
        if found is None:
            continue
        for place, result in zip(places, found, strict=True):
            results[place] = result
    return None if all(result is None for result in results) else tuple(results)


def _chosen(value: Any, places: list[int], count: int) -> Any:
    """``value`` (arguments) with only these places of every list of ``count`` items."""
    if isinstance(value, dict):
        return {key: _places(item, places, count) for key, item in value.items()}
    return tuple(_places(item, places, count) for item in value)


def _places(value: Any, places: list[int], count: int) -> Any:
    if isinstance(value, (list, tuple)) and len(value) == count:
        return [value[place] for place in places]
    return value
