"""What every axis of the mesh sends in a step, and what one block is: for readers of an estimate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shardwright.distributed.axes import EXPERT_SHARDS
from shardwright.distributed.planning.decided import innermost
from shardwright.estimate.hardware import Machine
from shardwright.estimate.kernel_time import Links
from shardwright.estimate.subject import Subject
from shardwright.estimate.trace.whole import Part
from shardwright.estimate.workload import Workload


@dataclass(frozen=True)
class AxisView:
    """The collectives over one axis in a step.

    Attributes:
        axis: ``tp``, ``cp``, ``ep``, ``dp_shard`` (context-parallel ranks among them), ``efsdp`` or ``dp_replicate``.
        ranks: along it.
        inside: whether they are all in one node.
        link: the fabric that they talk over.
        calls: kind of collective -> how many.
        sent: bytes that a rank sends, in rings.
    """

    axis: str
    ranks: int
    inside: bool
    link: str
    calls: Mapping[str, int]
    sent: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Call:
    """Collectives of one kind in a block.

    Attributes:
        bytes: of the whole tensor, each.
    """

    backward: bool
    axis: str
    kind: str
    count: int
    bytes: int


@dataclass(frozen=True)
class BlockView:
    """One block.

    Attributes:
        modules: names inside of it, and their styles.
        calls: that computation waits for.
    """

    name: str
    modules: tuple[tuple[str, str], ...]
    calls: tuple[Call, ...]


def axis_views(subject: Subject, workload: Workload, machine: Machine, parts: Sequence[Part]) -> tuple[AxisView, ...]:
    """The axes with more than one rank, and what a rank sends over each in a step."""
    links = Links(machine, subject.config)
    calls: dict[str, Counter[str]] = {}
    sent: Counter[str] = Counter()
    for axis, kind, times, size in _all(subject, workload, parts):
        ranks = links.sizes[axis]
        calls.setdefault(axis, Counter())[kind] += times
        sent[axis] += int(times * size * (ranks - 1) / ranks * (2 if kind == "all_reduce" else 1))
    return tuple(
        AxisView(axis, links.sizes[axis], links.inside(axis), links.name(axis), dict(calls.get(axis, {})), sent[axis])
        for axis in ("tp", "cp", "ep", EXPERT_SHARDS, "dp_shard", "dp_replicate")
        if links.sizes[axis] > 1 and (axis in calls or axis not in (EXPERT_SHARDS, "cp"))
    )


def _all(subject: Subject, workload: Workload, parts: Sequence[Part]) -> Iterator[tuple[str, str, int, int]]:
    """``(axis, kind, how often, bytes of the whole tensor)`` of a step."""
    for part in parts:
        for sending, count in part.segment.sent.items():
            yield sending.axis, sending.kind, count * workload.accumulation, sending.bytes
    data = subject.decided.data
    stay = {unit.modules[0] for unit in data.units if not unit.reshard_after_forward} if data is not None else set()
    reduced = 1 if workload.reduce_last_only else workload.accumulation
    for name, unit in subject.units.items():
        yield unit.axis, "all_gather", workload.accumulation * (1 if name in stay else 2), unit.gather
        if unit.reduce:
            yield unit.axis, "reduce_scatter", reduced, unit.reduce
            if subject.config.dp_replicate > 1:
                yield "dp_replicate", "all_reduce", reduced, unit.output


def block_view(subject: Subject, parts: Sequence[Part]) -> BlockView | None:
    """The block in the middle of the model: neither the first nor the last; None where there are no blocks."""
    blocks = subject.decided.blocks or tuple(subject.reading.blocks)
    if not blocks:
        return None
    name = blocks[len(blocks) // 2]
    tensor = subject.decided.tensor
    styles = {module: use.style for module, use in tensor.modules.items()} if tensor is not None else {}
    inside = [
        module
        for module in subject.reading.modules
        if module.startswith(f"{name}.") and (module in styles or subject.reading.modules[module]._parameters)
    ]
    experts = subject.decided.experts.modules if subject.decided.experts is not None else {}

    def style(module: str) -> str:
        if module in experts:
            return "experts on ranks of their own"
        return styles.get(module) or ("as around it" if innermost(module, styles) else "replicated")

    modules = tuple((module.removeprefix(f"{name}."), style(module)) for module in inside)
    sent: Counter[tuple[bool, str, str, int]] = Counter()
    for part in parts:
        if part.where == name:
            for sending, count in part.segment.sent.items():
                sent[part.segment.backward, sending.axis, sending.kind, sending.bytes] += count
    calls = tuple(
        Call(backward, axis, kind, count, size) for (backward, axis, kind, size), count in sorted(sent.items())
    )
    return BlockView(name, modules, calls)
