"""What FSDP2 gathers and reduces in one forward and backward of a micro-batch, and what it keeps in between."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from shardwright.distributed.config import ParallelConfig, Precision
from shardwright.distributed.models.blocks import block_names, by_list, kept_gathered, shared_parts
from shardwright.distributed.models.embedding_and_head import embedding_and_head_names
from shardwright.distributed.planning.units import unit_names
from shardwright.estimate.layout import ParameterLayout


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
    gather: int = 0  # bytes of the buffer that is gathered, padded where ranks have uneven parts
    reduce: int = 0  # bytes of the gradients that are reduced, padded too


def uses_fsdp2(config: ParallelConfig) -> bool:
    """Whether ``shardwright.parallelize`` makes units: it does not where there is nothing to shard and to cast."""
    sharded = config.dp_shard * config.dp_replicate > 1 or config.precision != Precision()
    return config.engine == "fsdp2" and sharded


def predict_gathering(model: nn.Module, layouts: Iterable[ParameterLayout], config: ParallelConfig) -> Gathering | None:
    """The gathers of ``model`` under ``config``; None where FSDP2 has no part in it.

    Parameters of one dtype per unit are taken for granted; FSDP2 gathers others apart.
    """
    if not uses_fsdp2(config):
        return None
    blocks = unit_names(model)
    shared = [name for parts in shared_parts(model, blocks) for name in parts]
    ends = embedding_and_head_names(model) if config.shard_ends else []
    units: dict[str, _Unit] = {}
    sizes = dict.fromkeys(blocks, 0)
    for layout in layouts:
        size = _add(layout, units.setdefault(_innermost(layout.module, [*shared, *ends, *blocks]), _Unit()), config)
        if block := _innermost(layout.module, blocks):
            sizes[block] += size
    budget = config.keep_gathered_gib * 2**30
    chosen = kept_gathered(by_list(blocks, block_names(model)), sizes, config.reshard_after_forward, budget)
    if config.reshard_after_forward == "never":
        chosen |= {*shared, *ends}
    elif config.reshard_after_forward == "default":
        chosen |= set(ends[-1:])  # the head, with which backward begins
    kept = [name for name in units if name in chosen]
    stay = {*kept, ""} & set(units)  # the root always does
    sent = sum(unit.reduce + unit.gather * (1 if name in stay else 2) for name, unit in units.items())
    return Gathering(
        units=len(units),
        kept=len(set(kept) & set(blocks)),
        kept_bytes=sum(units[name].gathered for name in stay),
        largest_bytes=max((unit.gathered for unit in units.values()), default=0),
        forward_gathers=len(units),
        backward_gathers=len(units) - len(stay),
        reduces=sum(unit.reduce > 0 for unit in units.values()),
        sent=sent * (config.dp_shard - 1) / config.dp_shard,
    )


def _add(layout: ParameterLayout, unit: _Unit, config: ParallelConfig) -> int:
    """Add a parameter to its unit; returns the bytes that it takes when it is gathered."""
    casts = config.precision != Precision()
    compute = getattr(torch, config.precision.param) if casts else layout.dtype
    reduce = getattr(torch, config.precision.reduce) if casts else layout.dtype
    padded = prod(layout.local_shape(config.tp, config.dp_shard)) * config.dp_shard
    gathered = prod(layout.local_shape(config.tp, 1)) * compute.itemsize
    unit.gathered += gathered
    unit.gather += padded * compute.itemsize
    unit.reduce += padded * reduce.itemsize if layout.trained else 0
    return gathered


def _innermost(module: str, units: list[str]) -> str:
    return max((unit for unit in units if module == unit or module.startswith(f"{unit}.")), key=len, default="")
