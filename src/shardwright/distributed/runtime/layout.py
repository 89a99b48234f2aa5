"""Local tensors as DTensors whose whole shape is known, and DTensors made whole."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from shardwright._torch import StridedShard
from shardwright.distributed.runtime import collectives as c


def sharded(local: Tensor, dim: int, length: int, mesh: DeviceMesh) -> DTensor:
    """This rank's chunk along ``dim``, which is ``length`` long in all, as a DTensor; chunks may be uneven."""
    dim %= local.ndim
    shape = torch.Size((*local.shape[:dim], length, *local.shape[dim + 1 :]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local.contiguous(), mesh, [Shard(dim)], run_check=False, shape=shape, stride=stride)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a DTensor (a collective), a plain tensor as it is.

    ``DTensor.full_tensor`` of torch 2.11 refuses packed weights; this goes axis by axis, which every version can do:
    FSDP2's axes come first in the mesh and cut what tensor parallelism has left.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    mesh, placements = tensor.device_mesh, tensor.placements
    own = "full_tensor" in vars(tensor)  # Megatron-FSDP's shards are no DTensor's; each knows how to become whole
    if own or not any(isinstance(placement, StridedShard) for placement in placements):
        return tensor.full_tensor()
    names = mesh.mesh_dim_names
    assert names is not None
    local = tensor.to_local().detach()
    for axis, placement in enumerate(placements):
        if not isinstance(placement, (Shard, StridedShard)):
            continue
        dim, group = placement.dim, c.Group.of(mesh[names[axis]])
        if axis < mesh.ndim - 1:
            local = c.all_gather(local, dim, length_here(tensor, axis, dim), group)
            continue
        local = c.all_gather(local, dim, tensor.shape[dim], group)
        if isinstance(placement, StridedShard):
            local = local.unflatten(dim, (group.size, placement.split_factor, -1)).transpose(dim, dim + 1)
            local = local.flatten(dim, dim + 2)
    return local


def part_of(tensor: Tensor, like: DTensor) -> Tensor:
    """This rank's part of ``tensor``, cut as ``like`` is: the inverse of :func:`whole`, without communication."""
    mesh = like.device_mesh
    for axis in reversed(range(mesh.ndim)):
        placement, size, rank = like.placements[axis], mesh.size(axis), mesh.get_local_rank(axis)
        if not isinstance(placement, (Shard, StridedShard)):
            continue
        dim = placement.dim
        if isinstance(placement, StridedShard) and axis == mesh.ndim - 1:
            pieces = tensor.unflatten(dim, (placement.split_factor, size, -1))
            tensor = pieces.select(dim + 1, rank).flatten(dim, dim + 1)
            continue
        length = tensor.shape[dim]
        chunk = -(-length // size)
        start = min(rank * chunk, length)
        tensor = tensor.narrow(dim, start, min(chunk, length - start))
    return tensor


def length_here(tensor: DTensor, axis: int, dim: int) -> int:
    """How long ``dim`` is once the axes up to ``axis`` are gathered, on this rank."""
    length = tensor.shape[dim]
    for later in range(axis + 1, tensor.device_mesh.ndim):
        placement = tensor.placements[later]
        if isinstance(placement, (Shard, StridedShard)) and placement.dim == dim:
            size, rank = tensor.device_mesh.size(later), tensor.device_mesh.get_local_rank(later)
            chunk = -(-length // size)
            length = max(min((rank + 1) * chunk, length) - rank * chunk, 0)
    return length
