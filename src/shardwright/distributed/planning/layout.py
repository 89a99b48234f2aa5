"""Where every parameter lies: its cut by tensor parallelism, and then by FSDP2."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement, Shard

from shardwright._torch import StridedShard
from shardwright.distributed.planning.decided import ExpertPlan
from shardwright.distributed.planning.resolved import ResolvedPlan
from shardwright.distributed.replay.reading import ModelReading
from shardwright.distributed.runtime.shard_dim import data_parallel_dim, expert_data_parallel_dim


@dataclass(frozen=True)
class ParameterLayout:
    """One parameter (a tied one once, under its first name).

    Attributes:
        module: name of the module that owns it.
        own: its name in that module.
        shape: of the whole parameter.
        placement: on the ``tp`` axis; of experts that are spread over ranks, on the ``ep`` axis.
        tp: number of tensor-parallel ranks.
        trained: whether it gets a gradient.
        ep: among how many ranks its experts are spread; None where it holds none that are.
    """

    module: str
    own: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    placement: Placement
    tp: int
    trained: bool
    ep: int | None = None

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
        """Elements on the first rank once FSDP2 has gathered it: of experts its own, else its tensor-parallel part."""
        return prod(self._gathered_shape())

    def data_parallel(self, dp_shard: int) -> int:
        """Over how many ranks FSDP2 shards it, where it shards others over ``dp_shard``."""
        return dp_shard if self.ep is None else dp_shard * self.tp // self.ep

    def _gathered_shape(self) -> list[int]:
        shape = list(self.shape)
        if isinstance(self.placement, (Shard, StridedShard)):
            shape[self.placement.dim] = -(-shape[self.placement.dim] // (self.ep or self.tp))
        return shape

    def local_shape(self, dp_shard: int) -> tuple[int, ...]:
        """The shape of the first rank's part: the largest, where the ranks' parts differ.

        Raises:
            PlanError: FSDP2 cannot cut the parameter over ``dp_shard`` ranks.
        """
        shape, ranks = self._gathered_shape(), self.data_parallel(dp_shard)
        if shape and ranks > 1:
            if self.ep is not None:
                dim = expert_data_parallel_dim(self.name, self.shape, self.ep, ranks)
            else:
                dim = data_parallel_dim(self.name, shape, [self.placement], ranks)
            shape[dim] = -(-shape[dim] // ranks)
        return tuple(shape)


def parameter_layouts(
    reading: ModelReading, resolved: ResolvedPlan | None, experts: ExpertPlan | None = None
) -> dict[int, ParameterLayout]:
    """The layout of every parameter by its identity, in the model's order. Without a plan, or with one rank, whole.

    Of a parameter that is a DTensor already, this rank's part is taken for the whole.
    """
    layouts: dict[int, ParameterLayout] = {}
    spread = {} if experts is None else dict.fromkeys(experts.parameters, experts.ep)
    for name, module in reading.modules.items():
        for own, param in module._parameters.items():
            if param is None or id(param) in layouts:
                continue
            shape = tuple((param.to_local() if isinstance(param, DTensor) else param).shape)
            cut = resolved is not None and resolved.tp > 1
            placement = resolved.placement(name, module, own) if resolved is not None and cut else Replicate()
            tp = resolved.tp if resolved is not None else 1
            if (ep := spread.get(f"{name}.{own}")) is not None:
                placement = Shard(0)
            layouts[id(param)] = ParameterLayout(name, own, shape, param.dtype, placement, tp, param.requires_grad, ep)
    return layouts
