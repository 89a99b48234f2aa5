"""Bytes that stay on a rank between steps: parameters, gradients and AdamW's two averages.

What comes and goes within a step (activations, the unit that an engine has gathered) is not in these numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, prod

import torch

from shardwright.distributed.config import ParallelConfig
from shardwright.distributed.planning.layout import ParameterLayout
from shardwright.distributed.precision import Precision


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank: the first, which has the most where parts are uneven."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer

    def to_dict(self) -> dict[str, int]:
        return {
            "parameters": self.parameters,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "total": self.total,
        }


def memory_per_rank(layouts: Iterable[ParameterLayout], config: ParallelConfig) -> Memory:
    """The memory of these parameters under the engine of ``config``.

    Args:
        config: with its precision settled.

    Raises:
        PlanError: FSDP2 cannot cut one of them over ``dp_shard`` ranks.
    """
    kept = _under_megatron if config.engine == "megatron_fsdp" else _under_fsdp2
    parts = [kept(layout, config) for layout in layouts]
    return Memory(
        sum(part.parameters for part in parts),
        sum(part.gradients for part in parts),
        sum(part.optimizer for part in parts),
    )


def _under_fsdp2(layout: ParameterLayout, config: ParallelConfig) -> Memory:
    """FSDP2 keeps gradients and the optimizer's state in a parameter's own dtype."""
    size = prod(layout.local_shape(config.parameter_ranks)) * layout.dtype.itemsize
    trained = size if layout.trained else 0
    return Memory(size, trained, 2 * trained)


def _under_megatron(layout: ParameterLayout, config: ParallelConfig) -> Memory:
    """Megatron-FSDP keeps an even part of each unit's flat buffers: of rounded weights, of those that the optimizer
    works on where they have another dtype, and of gradients, which stay for good. A gradient that is summed in another
    dtype than the optimizer's is rounded once more. The padding of the buffers, a few elements a unit, is left out.
    """
    part = ceil(layout.gathered_numel / config.parameter_ranks)
    casts = config.precision != Precision()
    compute = getattr(torch, config.precision.param) if casts else layout.dtype
    reduce = getattr(torch, config.precision.reduce) if casts else layout.dtype
    if not layout.trained:
        return Memory(part * compute.itemsize)
    weights = compute.itemsize + (layout.dtype.itemsize if layout.dtype != compute else 0)
    gradients = reduce.itemsize + (layout.dtype.itemsize if layout.dtype != reduce else 0)
    return Memory(part * weights, part * gradients, part * 2 * layout.dtype.itemsize)
