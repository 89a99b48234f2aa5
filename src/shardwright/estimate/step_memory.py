"""The memory of a step: the traced blocks, what FSDP2 holds around them, and what stays between steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shardwright.distributed.planning.decided import DecidedPlan
from shardwright.estimate.memory import memory_per_rank
from shardwright.estimate.optimizers import optimizer_bytes
from shardwright.estimate.peak import Kept, Moment, moments
from shardwright.estimate.subject import Subject
from shardwright.estimate.trace.whole import Part
from shardwright.estimate.workload import Workload


def step_moments(subject: Subject, workload: Workload, parts: Sequence[Part]) -> list[Moment]:
    """Every moment of a step on the first rank, with its bytes."""
    host = _on_host(subject.decided, parts)
    return moments(parts, subject.decided, kept_bytes(subject, workload), subject.units, host)


def kept_bytes(subject: Subject, workload: Workload) -> Kept:
    """What stays between steps, and between the micro-batches of one."""
    config, units = subject.config, subject.units
    memory = memory_per_rank(subject.layouts, config)
    dtype = None if workload.optimizer_dtype is None else getattr(torch, workload.optimizer_dtype)
    optimizer = optimizer_bytes(
        workload.optimizer, subject.layouts, config.parameter_ranks, blocks=subject.reading.blocks, state_dtype=dtype
    )
    accumulated = memory.gradients if workload.accumulation > 1 else 0
    unsharded = workload.reduce_last_only and workload.accumulation > 1 and bool(units)
    if unsharded:
        accumulated = sum(unit.reduce for unit in units.values())
    return Kept(
        memory.parameters,
        memory.gradients,
        optimizer.state,
        optimizer.working,
        accumulated,
        unsharded=unsharded,
        replicated=config.dp_replicate > 1,
        gather=config.parameter_ranks > 1,
    )


def _on_host(decided: DecidedPlan, parts: Sequence[Part]) -> dict[str, int]:
    """Block -> bytes of its input that wait in host memory."""
    if not decided.offload:
        return {}
    offloaded = set(decided.recomputed)
    return {part.where: part.segment.input for part in parts if part.where in offloaded and not part.segment.backward}
