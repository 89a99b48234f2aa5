"""What a rank's device holds beside tensors. Stated allowances, not measurements of the machine at hand."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from shardwright.distributed.config import ParallelConfig

MIB = 2**20
CONTEXT = 512 * MIB
"""A CUDA context with torch's kernels: 0.3 to 0.5 GB in reports of others."""
COMMUNICATOR = 512 * MIB
"""NCCL's buffers for one group of ranks: about 0.5 GB in reports of others."""
FRAGMENTATION = 0.05
"""What the caching allocator reserves above the tensors' peak. An allowance: it was not measured."""


@dataclass(frozen=True)
class Overheads:
    """Bytes on one rank."""

    context: int
    communicators: int
    fragmentation: int

    @property
    def total(self) -> int:
        return self.context + self.communicators + self.fragmentation


def overheads(config: ParallelConfig, tensors: int) -> Overheads:
    """For a rank whose tensors take ``tensors`` bytes at their peak."""
    groups = sum(size > 1 for size in (config.dp_replicate, config.dp_shard, config.cp, config.tp, config.ep))
    return Overheads(CONTEXT, groups * COMMUNICATOR, ceil(FRAGMENTATION * tensors))
