"""The bytes of FSDP2's units: their shards, what is gathered, and what is reduced."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch

from shardwright.distributed.axes import EXPERT_SHARDS
from shardwright.distributed.config import ParallelConfig
from shardwright.distributed.planning.decided import DataPlan, innermost
from shardwright.distributed.planning.layout import ParameterLayout
from shardwright.distributed.precision import Precision


@dataclass
class UnitBytes:
    """Bytes of one unit on one rank.

    Attributes:
        gathered: its parameters, whole but for tensor parallelism's cut, in the dtype that is computed in.
        gather: the buffer that is gathered into, padded where ranks have uneven parts.
        reduce: the buffer of gradients that is reduced, padded too; frozen parameters have none.
        shard: this rank's part of the gradients, in the dtype that they are kept in.
        output: the same part, in the dtype that gradients are summed in.
        gradients: the gradients as backward makes them.
        sent_gathering: what a rank sends to gather it, in a ring.
        sent_reducing: what it sends to reduce its gradients.
        axis: over which it is gathered: that of experts is another.
        copied: the largest of those parameters that are not cut along their first dim: they are copied once more.
    """

    gathered: int = 0
    gather: int = 0
    reduce: int = 0
    shard: int = 0
    output: int = 0
    gradients: int = 0
    sent_gathering: int = 0
    sent_reducing: int = 0
    copied: int = 0
    axis: str = "dp_shard"


def unit_bytes(layouts: Iterable[ParameterLayout], plan: DataPlan, config: ParallelConfig) -> dict[str, UnitBytes]:
    """The units by the name of their first module.

    Parameters of one dtype per unit are taken for granted; FSDP2 gathers others apart.

    Args:
        config: with its precision settled and ``dp_shard`` filled in.
    """
    units = {unit.modules[0]: UnitBytes(axis=EXPERT_SHARDS if unit.experts else "dp_shard") for unit in plan.units}
    unit_of = {name: unit.modules[0] for unit in plan.units for name in unit.modules}
    for layout in layouts:
        _add(layout, units[unit_of[innermost(layout.module, unit_of)]], config)
    return units


def _add(layout: ParameterLayout, unit: UnitBytes, config: ParallelConfig) -> None:
    casts = config.precision != Precision()
    compute = getattr(torch, config.precision.param) if casts else layout.dtype
    reduce = getattr(torch, config.precision.reduce) if casts else layout.dtype
    local, ranks = layout.local_shape(config.parameter_ranks), layout.data_parallel(config.parameter_ranks)
    padded = prod(local) * ranks
    unit.sent_gathering += prod(local) * (ranks - 1) * compute.itemsize
    unit.gathered += layout.gathered_numel * compute.itemsize
    unit.gather += padded * compute.itemsize
    if layout.trained:
        unit.reduce += padded * reduce.itemsize
        unit.shard += prod(local) * layout.dtype.itemsize
        unit.sent_reducing += prod(local) * (ranks - 1) * reduce.itemsize
        unit.output += prod(local) * reduce.itemsize
        unit.gradients += layout.gathered_numel * compute.itemsize
    if local[:1] == layout.local_shape(1)[:1] and ranks > 1 and local:
        unit.copied = max(unit.copied, padded * compute.itemsize)
