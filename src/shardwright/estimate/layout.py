"""Where every parameter lies: its cut by tensor parallelism, and then by FSDP2."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.placement_types import Placement, Shard, _StridedShard

from shardwright.distributed.planning.resolved import ResolvedPlan
from shardwright.errors import PlanError


@dataclass(frozen=True)
class ParameterLayout:
    """One parameter (a tied one once, under its first name).

    Attributes:
        module: name of the module that owns it.
        own: its name in that module.
        shape: of the whole parameter.
        placement: on the ``tp`` axis.
        trained: whether it gets a gradient.
    """

    module: str
    own: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    placement: Placement
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
        return isinstance(self.placement, (Shard, _StridedShard))

    def local_shape(self, tp: int, dp_shard: int) -> tuple[int, ...]:
        """The shape of the first rank's part: the largest, where the ranks' parts differ.

        Raises:
            PlanError: FSDP2 cannot cut the parameter over ``dp_shard`` ranks.
        """
        shape = list(self.shape)
        if isinstance(self.placement, (Shard, _StridedShard)):
            shape[self.placement.dim] = -(-shape[self.placement.dim] // tp)
        if shape and dp_shard > 1:
            dim = self._data_parallel_dim(shape, dp_shard)
            shape[dim] = -(-shape[dim] // dp_shard)
        return tuple(shape)

    def _data_parallel_dim(self, shape: list[int], dp_shard: int) -> int:
        """FSDP2 cuts dim 0; of a packed weight, whose dim 0 is cut piece by piece, the other (``apply.fsdp2``)."""
        if not isinstance(self.placement, _StridedShard) or self.placement.dim != 0:
            return 0
        if len(shape) < 2 or shape[1] % dp_shard:
            raise PlanError(
                f"{self.name} is packed and has shape {self.shape}: FSDP2 cannot cut it over {dp_shard} data-parallel "
                "ranks beside its tensor-parallel cut, because its second dim must be a multiple of that. Choose "
                "another dp_shard, or use dp_replicate."
            )
        return 1


def parameter_layouts(model: nn.Module, resolved: ResolvedPlan) -> list[ParameterLayout]:
    """The layout of every parameter, in the model's order. With one tensor-parallel rank all are whole."""
    layouts: dict[int, ParameterLayout] = {}
    for name, module in model.named_modules():
        for own, param in module._parameters.items():
            if param is None or id(param) in layouts:
                continue
            layouts[id(param)] = ParameterLayout(
                name, own, tuple(param.shape), param.dtype, _placement(name, module, own, resolved), param.requires_grad
            )
    return list(layouts.values())


def _placement(name: str, module: nn.Module, own: str, resolved: ResolvedPlan) -> Placement:
    return Replicate() if resolved.tp == 1 else resolved.placement(name, module, own)
