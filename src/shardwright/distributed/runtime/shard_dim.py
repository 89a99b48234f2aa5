"""Along which dim FSDP2 cuts a parameter that tensor parallelism may have cut before."""

from __future__ import annotations

from collections.abc import Sequence

from torch.distributed.tensor.placement_types import Placement

from shardwright._torch import StridedShard
from shardwright.errors import PlanError


def data_parallel_dim(name: str, shape: Sequence[int], placements: Sequence[Placement], dp_shard: int) -> int:
    """The dim that FSDP2 cuts: 0; of a packed weight, whose dim 0 tensor parallelism cuts piece by piece, the other.

    Args:
        name: of the parameter, for the error.
        placements: on the axes of tensor parallelism.

    Raises:
        PlanError: ``dp_shard`` ranks do not divide that other dim.
    """
    if not any(isinstance(placement, StridedShard) and placement.dim == 0 for placement in placements):
        return 0
    if len(shape) < 2 or shape[1] % dp_shard:
        raise PlanError(
            f"{name} is packed and has shape {tuple(shape)}: FSDP2 cannot cut it over {dp_shard} data-parallel ranks "
            "beside its tensor-parallel cut, because its second dim must be a multiple of that. Choose another "
            "dp_shard, or use dp_replicate."
        )
    return 1


def expert_data_parallel_dim(shape: Sequence[int], ranks: int) -> int:
    """The dim along which FSDP2 cuts a rank's part of stacked experts, ``[experts, ...]``: 0 where ``ranks`` divide it.

    Where they do not (a few large experts over many ranks), the first that they divide: every rank then holds a part,
    and gathers without padding. Where they divide none, 0.
    """
    return next((dim for dim, size in enumerate(shape) if size % ranks == 0), 0)
