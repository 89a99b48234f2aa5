"""Where every parameter lies: its cut by tensor parallelism, and then by FSDP2."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement, Shard

from shardwright._torch import StridedShard
from shardwright.distributed.planning.resolved import ResolvedPlan
from shardwright.distributed.replay.reading import ModelReading
from shardwright.distributed.runtime.shard_dim import data_parallel_dim


@dataclass(frozen=True)
class ParameterLayout:
    """One parameter (a tied one once, under its first name).

    Attributes:
        module: name of the module that owns it.
        own: its name in that module.
        shape: of the whole parameter.
        placement: on the ``tp`` axis.
        tp: number of tensor-parallel ranks.
        trained: whether it gets a gradient.
    """

    module: str
    own: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    placement: Placement
    tp: int
    trained: bool

    @property
    def name(self) -> str:
        return f"{self.module}.{self.own}" if self.module else self.own

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def cut(self) -> bool:
        """Whether tensor parallelism cuts it."""
        return isinstance(self.placement, (Shard, StridedShard))

    @property
    def gathered_numel(self) -> int:
        """Elements on the first rank when FSDP2 has gathered it: its tensor-parallel part."""
        return prod(self.local_shape(1))

    def local_shape(self, dp_shard: int) -> tuple[int, ...]:
        """The shape of the first rank's part: the largest, where the ranks' parts differ.

        Raises:
            PlanError: FSDP2 cannot cut the parameter over ``dp_shard`` ranks.
        """
        shape = list(self.shape)
        if isinstance(self.placement, (Shard, StridedShard)):
            shape[self.placement.dim] = -(-shape[self.placement.dim] // self.tp)
        if shape and dp_shard > 1:
            dim = data_parallel_dim(self.name, shape, [self.placement], dp_shard)
            shape[dim] = -(-shape[dim] // dp_shard)
        return tuple(shape)


def parameter_layouts(reading: ModelReading, resolved: ResolvedPlan | None) -> dict[int, ParameterLayout]:
    """The layout of every parameter by its identity, in the model's order. Without a plan, or with one rank, whole.

    Of a parameter that is a DTensor already, this rank's part is taken for the whole.
    """
    layouts: dict[int, ParameterLayout] = {}
    for name, module in reading.modules.items():
        for own, param in module._parameters.items():
            if param is None or id(param) in layouts:
                continue
            shape = tuple((param.to_local() if isinstance(param, DTensor) else param).shape)
            cut = resolved is not None and resolved.tp > 1
            placement = resolved.placement(name, module, own) if resolved is not None and cut else Replicate()
            tp = resolved.tp if resolved is not None else 1
            layouts[id(param)] = ParameterLayout(name, own, shape, param.dtype, placement, tp, param.requires_grad)
    return layouts
