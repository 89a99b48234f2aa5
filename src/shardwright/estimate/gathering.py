"""What FSDP2 gathers and reduces in one forward and backward of a micro-batch, and what it keeps in between."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch

from shardwright.distributed.config import ParallelConfig, Precision
from shardwright.distributed.planning.decided import DecidedPlan, innermost
from shardwright.distributed.planning.layout import ParameterLayout


@dataclass(frozen=True)
class Gathering:
    """FSDP2's part of a micro-batch. Bytes are those of one rank.

    Attributes:
        units: how many there are, the root's among them.
        kept: blocks that stay gathered between forward and backward.
        kept_bytes: of the parameters of all units that do: the root's always does.
        largest_bytes: of the largest unit's parameters; those of the others come and go.
        forward_gathers: all-gathers in forward.
        backward_gathers: all-gathers in backward.
        reduces: reduce-scatters of gradients.
        sent: bytes that a rank sends for these, in rings. Sums over replicas are not in it.
    """

    units: int
    kept: int
    kept_bytes: int
    largest_bytes: int
    forward_gathers: int
    backward_gathers: int
    reduces: int
    sent: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Unit:
    gathered: int = 0  # bytes of the parameters
    gather: int = 0  # bytes that a rank sends to gather it, padded where ranks have uneven parts
    trained: bool = False
    reduce: int = 0  # bytes that it sends to reduce its gradients, padded too


def predict_gathering(
    layouts: Iterable[ParameterLayout], decided: DecidedPlan, config: ParallelConfig
) -> Gathering | None:
    """The gathers of FSDP2's units under ``config``; None where FSDP2 has no part in it.

    Parameters of one dtype per unit are taken for granted; FSDP2 gathers others apart.
    """
    plan = decided.data
    if plan is None:
        return None
    units = {unit.modules[0]: _Unit() for unit in plan.units}
    unit_of = {name: unit.modules[0] for unit in plan.units for name in unit.modules}
    for layout in layouts:
        _add(layout, units[unit_of[innermost(layout.module, unit_of)]], config)
    used = {name: unit for name, unit in units.items() if unit.gathered}
    stay = {unit.modules[0] for unit in plan.units if not unit.reshard_after_forward} & set(used)
    sent = sum(unit.reduce + unit.gather * (1 if name in stay else 2) for name, unit in used.items())
    return Gathering(
        units=len(used),
        kept=len(stay & set(decided.blocks)),
        kept_bytes=sum(used[name].gathered for name in stay),
        largest_bytes=max((unit.gathered for unit in used.values()), default=0),
        forward_gathers=len(used),
        backward_gathers=len(used) - len(stay),
        reduces=sum(unit.trained for unit in used.values()),
        sent=sent,
    )


def _add(layout: ParameterLayout, unit: _Unit, config: ParallelConfig) -> None:
    """Add a parameter to its unit."""
    casts = config.precision != Precision()
    compute = getattr(torch, config.precision.param) if casts else layout.dtype
    reduce = getattr(torch, config.precision.reduce) if casts else layout.dtype
    sent = prod(layout.local_shape(config.dp_shard)) * (layout.data_parallel(config.dp_shard) - 1)
    unit.gathered += layout.gathered_numel * compute.itemsize
    unit.gather += sent * compute.itemsize
    unit.reduce += sent * reduce.itemsize if layout.trained else 0
    unit.trained |= layout.trained
