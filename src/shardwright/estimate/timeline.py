"""When a rank computes and when it communicates in a step: two queues, as FSDP2's streams are.

Computation is one queue. The gathers and reductions of FSDP2 are the other: a gather is issued when the block before
begins, a reduction when its block's backward has ended, and a block waits for its own gather. The collectives of
tensor, context and expert parallelism are in the first queue, because the next kernel needs their result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from shardwright.distributed.planning.decided import ROOT, innermost
from shardwright.estimate.hardware import Machine
from shardwright.estimate.kernel_time import Links, segment_seconds
from shardwright.estimate.subject import Subject
from shardwright.estimate.trace.whole import Part
from shardwright.estimate.workload import Workload

COMPUTE, DATA = "compute", "FSDP2"
AXES = {"tp": "tensor parallelism", "cp": "context parallelism", "ep": "expert parallelism"}
"""Axes whose collectives computation waits for, and their queues."""


@dataclass(frozen=True)
class Span:
    """Something that takes time.

    Attributes:
        queue: :data:`COMPUTE`, one of :data:`AXES` (all of them in the first queue) or :data:`DATA`.
        name: what it is.
        start, end: in seconds from the step's beginning.
    """

    queue: str
    name: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass
class Timeline:
    """The spans of one micro-batch."""

    spans: list[Span] = field(default_factory=list)
    computed: float = 0.0  # when the first queue is free
    sent: float = 0.0  # when the second queue is free

    def compute(self, queue: str, name: str, seconds: float, after: float = 0.0) -> float:
        """Add to the first queue; the time when it begins."""
        start = max(self.computed, after)
        if seconds:
            self.spans.append(Span(queue, name, start, start + seconds))
        self.computed = start + seconds
        return start

    def send(self, name: str, seconds: float, issued: float) -> float:
        """Add to the second queue; the time when it ends."""
        start = max(self.sent, issued)
        if not seconds:
            return issued
        self.spans.append(Span(DATA, name, start, start + seconds))
        self.sent = start + seconds
        return self.sent

    def busy(self, queue: str) -> float:
        return sum(span.seconds for span in self.spans if span.queue == queue)

    @property
    def end(self) -> float:
        return max(self.computed, self.sent)

    @property
    def waiting(self) -> float:
        """Seconds in which the first queue waits for FSDP2."""
        return self.end - sum(span.seconds for span in self.spans if span.queue != DATA)


def timeline(
    subject: Subject, workload: Workload, machine: Machine, parts: Sequence[Part], *, reduces: bool = True
) -> Timeline:
    """One micro-batch.

    Args:
        reduces: its gradients are summed over the data-parallel ranks.
    """
    accumulates = workload.reduce_last_only and workload.accumulation > 1
    return _Rank(subject, machine, reduces=reduces, accumulates=accumulates).run(parts)


class _Rank:
    def __init__(self, subject: Subject, machine: Machine, *, reduces: bool, accumulates: bool) -> None:
        self.subject, self.machine, self.units = subject, machine, subject.units
        self.reduces, self.accumulates = reduces, accumulates
        self.links = Links(machine, subject.config)
        self.line = Timeline()
        data, blocks = subject.decided.data, set(subject.reading.blocks)
        self.of_block: dict[str, list[str]] = {}
        self.reshards = {unit.modules[0]: unit.reshard_after_forward for unit in data.units} if data else {}
        for unit in data.units if data else ():
            for name in unit.modules:
                self.of_block.setdefault(innermost(name, blocks), []).append(unit.modules[0])
        self.of_block.pop(ROOT, None)
        self.compiled = {innermost(name, blocks) for name in subject.decided.compiled} - {ROOT}
        if subject.decided.compiled_whole:
            self.compiled = {ROOT, *subject.reading.blocks}
        self.ready: dict[str, float] = {}

    def run(self, parts: Sequence[Part]) -> Timeline:
        if ROOT in self.units:
            self.gather(ROOT, 0.0)
            self.line.computed = max(self.line.computed, self.ready[ROOT])
        for place, part in enumerate(parts):
            self.part(part, parts[place + 1 :])
        if ROOT in self.units:
            self.reduce(ROOT)
        self.line.computed = self.line.end
        return self.line

    def part(self, part: Part, later: Sequence[Part]) -> None:
        own = self.units_of(part.where)
        if part.segment.loss and self.reshards.get(ROOT):
            self.ready.pop(ROOT, None)
        elif ROOT in self.units:
            own = [*own, ROOT] if ROOT not in self.ready else own
        for unit in own:
            if unit not in self.ready:
                self.gather(unit, self.line.computed)
        ready = max((self.ready[unit] for unit in own), default=0.0)
        name = f"{'backward' if part.segment.backward else 'forward'} {part.where or 'outside of the blocks'}"
        fused = part.where in self.compiled and not part.segment.loss
        seconds = segment_seconds(part.segment, self.machine, fused=fused) + self.copying(own, part)
        begun = self.line.compute(COMPUTE, name, seconds, ready)
        for where in self.following(part.where, later):
            for unit in self.units_of(where):
                if unit not in self.ready:
                    self.gather(unit, begun)
        for axis, queue in AXES.items():
            self.line.compute(queue, name, self.links.sending_seconds(axis, part.segment.sent.items()))
        last = not later or later[0].where != part.where
        for unit in own:
            if unit == ROOT:
                continue
            if part.segment.backward and last:
                self.reduce(unit)
            if last and (part.segment.backward or self.reshards[unit]):
                self.ready.pop(unit, None)

    def units_of(self, where: str) -> list[str]:
        return [unit for unit in self.of_block.get(where, ()) if unit in self.units]

    def following(self, where: str, later: Sequence[Part]) -> list[str]:
        """The blocks that are gathered ahead while ``where`` runs, the nearest first."""
        found = dict.fromkeys(part.where for part in later[: 4 * self.subject.config.prefetch] if part.where != where)
        return list(found)[: self.subject.config.prefetch]

    def copying(self, units: Sequence[str], part: Part) -> float:
        """Out of the buffer of a gather; in backward into that of a reduction, too."""
        moved = 0
        for unit in units:
            size = self.units[unit]
            moved += 2 * size.gathered
            if part.segment.backward and self.reduces:
                moved += size.gradients + size.reduce + (size.output + size.shard)
                moved += 2 * size.reduce if self.subject.config.parameter_ranks == 1 else 0
            if part.segment.backward and self.accumulates:
                moved += size.gradients + 2 * size.reduce
        return moved / (self.machine.device.memory_gb_per_s * 1e9 * self.machine.efficiencies.memory)

    def gather(self, unit: str, issued: float) -> None:
        seconds = self.links.seconds(self.units[unit].axis, "all_gather", self.units[unit].gather)
        self.ready[unit] = self.line.send(f"gather {unit or 'outside of the blocks'}", seconds, issued)

    def reduce(self, unit: str) -> None:
        size = self.units[unit]
        if not self.reduces or not size.reduce:
            return
        seconds = self.links.seconds(size.axis, "reduce_scatter", size.reduce)
        seconds += self.links.seconds("dp_replicate", "all_reduce", size.output)
        self.line.send(f"reduce {unit or 'outside of the blocks'}", seconds, self.line.computed)
