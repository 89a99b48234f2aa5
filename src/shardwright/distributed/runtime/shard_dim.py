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


def expert_data_parallel_dim(name: str, shape: Sequence[int], ep: int, ranks: int) -> int:
    """The dim along which FSDP2 cuts stacked experts, ``[experts, ...]``, that lie on ``ep`` ranks already.

    0 where all ranks get as many experts. Where they do not (a few large experts over many ranks), the first other dim
    that ``ranks`` divide: every rank then holds a part, and gathers without padding.

    Args:
        name: of the parameter, for the error.
        shape: of the parameter, whole.
        ranks: FSDP2's.

    Raises:
        PlanError: ``ranks`` divide none.
    """
    if ranks == 1 or shape[0] % (ep * ranks) == 0:
        return 0
    dim = next((dim for dim, size in enumerate(shape) if dim and size % ranks == 0), None)
    if dim is None:
        raise PlanError(
            f"{name} has shape {tuple(shape)}: FSDP2 cannot cut its experts, which lie on ep={ep} ranks, over the "
            f"other {ranks} ranks, since {ranks} divide neither {shape[0]} / {ep} experts nor another dim. Choose "
            "another ep, or use dp_replicate."
        )
    return dim
