"""Bytes that stay on a rank between steps: parameters, gradients and AdamW's two averages.

What comes and goes within a step (activations, the unit that FSDP2 has gathered) is not in these numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from shardwright.distributed.planning.layout import ParameterLayout


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


def memory_per_rank(layouts: Iterable[ParameterLayout], dp_shard: int) -> Memory:
    """The memory of these parameters under FSDP2, which keeps gradients and AdamW's state in a parameter's own dtype.

    Raises:
        PlanError: FSDP2 cannot cut one of them over ``dp_shard`` ranks.
    """
    parameters = trained = 0
    for layout in layouts:
        size = prod(layout.local_shape(dp_shard)) * layout.dtype.itemsize
        parameters += size
        trained += size if layout.trained else 0
    return Memory(parameters, trained, 2 * trained)
