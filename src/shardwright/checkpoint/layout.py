"""Which part of a whole tensor this rank holds, for any DTensor placement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement

from shardwright._torch import StridedShard
from shardwright.distributed.apply.megatron_fsdp import held_rows
from shardwright.errors import UnsupportedError

Box = tuple[slice, ...]  # one slice with start and stop per dim


@dataclass(frozen=True)
class Part:
    """A box of a whole tensor and where it lies in the local one. Both have the same shape."""

    whole: Box
    local: Box


def owned_parts(tensor: Tensor) -> list[Part]:
    """The boxes of the whole tensor that make up this rank's local tensor, which they cover without overlap.

    A plain tensor is one box. A DTensor can be several: a packed weight (``gate_up_proj``) that is split inside each
    of its halves, for example. A rank that holds nothing gets no box. Megatron-FSDP's shards are not where their
    placements say; they know where they lie.

    Raises:
        UnsupportedError: a placement that is neither a shard nor a replica, such as ``Partial``.
    """
    if not isinstance(tensor, DTensor):
        box = tuple(slice(0, size) for size in tensor.shape)
        return [Part(box, box)]
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return []
    indices = [torch.arange(size) for size in tensor.shape]
    rows = held_rows(tensor)
    for mesh_dim, placement in enumerate(tensor.placements):
        if placement.is_replicate() or (rows is not None and mesh_dim == 0):
            continue
        dim = _sharded_dim(placement, tensor.placements)
        indices[dim] = _take(indices[dim], placement, tensor.device_mesh.size(mesh_dim), coordinate[mesh_dim])
    if rows is not None:
        indices[0] = indices[0][rows]
    local_shape = tuple(tensor.to_local().shape)
    computed = tuple(len(index) for index in indices)
    if 0 not in computed and computed != local_shape:
        raise UnsupportedError(
            f"The local shape of a tensor of shape {tuple(tensor.shape)} with placements {tensor.placements} is "
            f"{local_shape}, but by these placements it should be {computed}. It cannot be read or written safely."
        )
    return [_part(pieces) for pieces in product(*(_runs(index) for index in indices))]


def _sharded_dim(placement: Placement, placements: Sequence[Placement]) -> int:
    if isinstance(placement, (Shard, StridedShard)):
        return placement.dim
    raise UnsupportedError(f"A tensor with placements {tuple(placements)} has no values that could be read or written.")


def _take(index: Tensor, placement: Placement, ranks: int, rank: int) -> Tensor:
    """The entries of ``index`` (1-D) that ``rank`` of ``ranks`` keeps under ``placement``."""
    if not isinstance(placement, StridedShard):
        return _chunk(index, ranks, rank)
    factor = int(placement.split_factor)
    return torch.cat([_chunk(_chunk(index, factor, i), ranks, rank) for i in range(factor)])


def _chunk(index: Tensor, chunks: int, which: int) -> Tensor:
    """As ``torch.chunk``, with empty chunks at the end where there is not enough for all."""
    size = -(-len(index) // chunks)
    return index[which * size : (which + 1) * size]


def _runs(index: Tensor) -> list[tuple[slice, slice]]:
    """Runs of consecutive numbers in ``index``: (the numbers, their positions in ``index``)."""
    if not len(index):
        return []
    breaks = (torch.nonzero(index.diff() != 1).flatten() + 1).tolist()
    edges = [0, *breaks, len(index)]
    runs = []
    for start, stop in pairwise(edges):
        first = int(index[start])
        runs.append((slice(first, first + stop - start), slice(start, stop)))
    return runs


def _part(pieces: tuple[tuple[slice, slice], ...]) -> Part:
    return Part(tuple(whole for whole, _ in pieces), tuple(local for _, local in pieces))
