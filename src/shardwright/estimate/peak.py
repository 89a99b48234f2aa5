"""The bytes on a rank from moment to moment of a training step, and where they are the most.

What FSDP2 holds follows the order of its hooks (torch 2.11 to 2.13, ``_fsdp_param_group.py``): in forward the buffer
that a unit was gathered into stays until the next unit has been copied out of its own; in backward it goes at once, the
next unit's is filled ahead, and the buffer of gradients that are reduced stays until the next unit's backward ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from shardwright.distributed.planning.decided import ROOT, DecidedPlan
from shardwright.estimate.trace.whole import Part
from shardwright.estimate.units import UnitBytes

STATES = ("parameters", "optimizer", "gradients", "gathered", "buffers", "unreduced", "activations", "working")
"""The parts of a moment's bytes: parameters, optimizer state and gradients as they are kept; gathered parameters;
buffers of gathers and reductions; gradients that are not reduced yet; activations kept for backward; what the running
code needs beside all that."""


@dataclass(frozen=True)
class Moment:
    """A moment of a step.

    Attributes:
        phase: ``"forward"``, ``"backward"`` or ``"step"``.
        where: the block; ``""`` outside of the blocks.
        parts: of :data:`STATES`, in bytes.
        streams: those of them that FSDP2 allocates on streams of its own.
    """

    phase: str
    where: str
    parts: Mapping[str, int]
    streams: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Kept:
    """Bytes that a rank keeps between steps, and what its optimizer needs beside them.

    Attributes:
        accumulated: of gradients before the last micro-batch: 0 with one micro-batch.
        unsharded: the accumulated gradients are whole on every rank, and reduced with the last micro-batch.
        replicated: gradients are summed over replicas besides (HSDP).
        gather: FSDP2 gathers over more than one rank.
    """

    parameters: int
    gradients: int
    optimizer: int
    working: int
    accumulated: int = 0
    unsharded: bool = False
    replicated: bool = False
    gather: bool = True


def moments(
    parts: Sequence[Part], decided: DecidedPlan, kept: Kept, units: Mapping[str, UnitBytes], host: Mapping[str, int]
) -> list[Moment]:
    """Every moment of the last micro-batch of a step, and the optimizer's.

    Args:
        units: by the name of their first module; empty without FSDP2.
        host: block -> bytes of its input that wait in host memory.
    """
    rank = _Rank(decided, kept, units, host)
    forward = [part for part in parts if not part.segment.backward]
    backward = [part for part in parts if part.segment.backward]
    rank.forward(forward)
    rank.backward(backward)
    rank.step()
    return rank.moments


def peak(found: Iterable[Moment]) -> Moment:
    """The moment with the most bytes."""
    return max(found, key=lambda moment: moment.total)


def reserved(found: Sequence[Moment]) -> int:
    """Bytes that torch's caching allocator takes for these moments, fragmentation left out.

    What a stream has freed serves that stream alone, so the peaks of the streams add up, whenever they are.
    """
    names = {name for moment in found for name in moment.streams}
    own = max(moment.total - sum(moment.streams.values()) for moment in found)
    return own + sum(max(moment.streams.get(name, 0) for moment in found) for name in names)


@dataclass
class _Rank:
    """What one rank holds while it goes through a step."""

    decided: DecidedPlan
    kept: Kept
    units: Mapping[str, UnitBytes]
    host: Mapping[str, int]
    moments: list[Moment] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gathered: dict[str, int] = {}
        self.buffers: dict[str, int] = {}
        self.held: str | None = None  # the unit whose buffer stays until the next one is copied out
        self.reducing: str | None = None
        self.gradients = self.kept.accumulated
        self.sharded = self.kept.accumulated if self.units and not self.kept.unsharded else 0
        self.unreduced = self.activations = 0
        data = self.decided.data
        self.reshards = {unit.modules[0]: unit.reshard_after_forward for unit in data.units} if data else {}
        self.unit_of = {name: unit.modules[0] for unit in data.units for name in unit.modules} if data else {}
        self.prefetch = data.prefetch if data else {}
        self.inside: dict[str, list[str]] = {}  # block -> its units, once they have been looked for

    def look(self, phase: str, where: str, working: int = 0) -> None:
        values = (
            self.kept.parameters, self.kept.optimizer, self.gradients, sum(self.gathered.values()),
            sum(self.buffers.values()), self.unreduced, self.activations, working,
        )  # fmt: skip
        gathers = sum(size for name, size in self.buffers.items() if name.startswith("gather "))
        streams = {"gathers": gathers, "reductions": self.sharded + self.buffers.get("sum over replicas", 0)}
        self.moments.append(Moment(phase, where, dict(zip(STATES, values, strict=True)), streams))

    def units_of(self, where: str, outside: str | None) -> list[str]:
        """The units that run in a part: those of its block, or the embedding or head that is one by itself."""
        if where:
            if where not in self.inside:
                found = {unit for name, unit in self.unit_of.items() if f"{name}.".startswith(f"{where}.")}
                self.inside[where] = [unit for unit in self.units if unit in found]
            return self.inside[where]
        return [outside] if outside and outside in self.units else []

    def ends(self, parts: Sequence[Part]) -> dict[int, str]:
        """Place of a part -> the embedding or head that runs in it, where these are units."""
        if len(self.decided.readable) < 2 or not parts:
            return {}
        embedding, head = self.decided.readable
        ordered = (head, embedding) if parts[0].segment.backward else (embedding, head)
        places = [place for place, part in enumerate(parts) if not part.segment.loss]
        return {places[0]: ordered[0], places[-1]: ordered[1]}

    def forward(self, parts: Sequence[Part]) -> None:
        if ROOT in self.units:
            self.gather(ROOT, "forward", "")
        ends = self.ends(parts)
        for place, part in enumerate(parts):
            running = self.units_of(part.where, ends.get(place))
            if part.segment.loss and self.reshards.get(ROOT):
                self.gathered.pop(ROOT, None)
            for unit in running:
                self.gather(unit, "forward", part.where)
            self.fill_ahead(self.prefetch.get(part.where, ((), ()))[0])
            self.look("forward", part.where, part.segment.peak)
            self.activations += part.segment.delta - self.host.get(part.where, 0)
            for unit in running:
                if self.reshards[unit]:
                    self.gathered.pop(unit, None)
        self.drop_held()

    def backward(self, parts: Sequence[Part]) -> None:
        ends = self.ends(parts)
        # Without units each gradient is added to what is there as soon as it is made, but by a model compiled as one.
        adds_at_once = bool(self.kept.accumulated) and not self.units and not self.decided.compiled_whole
        for place, part in enumerate(parts):
            running = self.units_of(part.where, ends.get(place))
            if not part.segment.loss and ROOT in self.units:
                self.gather(ROOT, "backward", "")
            for unit in running:
                self.gather(unit, "backward", part.where)
            following = next((later.where for later in parts[place + 1 :] if later.where != part.where), "")
            self.fill_ahead(self.prefetch[part.where][1] if part.where in self.prefetch else (following,))
            waiting = self.host.get(part.where, 0) + self.host.get(following, 0)  # fetched, and fetched ahead
            self.look("backward", part.where, part.segment.peak + waiting)
            self.activations += part.segment.delta + self.host.get(part.where, 0)
            if not adds_at_once:
                self.unreduced += part.segment.gradients
            last = place + 1 == len(parts) or parts[place + 1].where != part.where
            for unit in running if last else ():
                self.reduce(unit, part.where)
        if ROOT in self.units:
            self.reduce(ROOT, "")
        if not self.units:
            self.gradients, self.unreduced = max(self.unreduced, self.kept.accumulated), 0
        self.drop_reducing()

    def step(self) -> None:
        self.gathered, self.buffers, self.unreduced, self.activations = {}, {}, 0, 0
        self.gradients = self.kept.gradients
        self.sharded = self.kept.gradients if self.units else 0
        self.look("step", "", self.kept.working)

    def gather(self, unit: str, phase: str, where: str) -> None:
        if unit in self.gathered:
            return
        size = self.units[unit]
        if self.kept.gather:
            self.buffers.setdefault(f"gather {unit}", size.gather)
            self.look(phase, where)
            if phase == "forward":
                self.drop_held()
        self.gathered[unit] = size.gathered
        self.look(phase, where, size.copied)
        if phase == "forward":
            self.held = unit
        else:
            self.buffers.pop(f"gather {unit}", None)

    def drop_held(self) -> None:
        self.buffers.pop(f"gather {self.held}", None)

    def fill_ahead(self, blocks: Iterable[str]) -> None:
        for block in blocks if self.kept.gather else ():
            for unit in self.units_of(block, None):
                if unit not in self.gathered:
                    self.buffers.setdefault(f"gather {unit}", self.units[unit].gather)

    def reduce(self, unit: str, where: str) -> None:
        """The gradients of ``unit`` are copied into one buffer, freed, and summed over the ranks."""
        self.gathered.pop(unit, None)
        self.drop_reducing()
        size = self.units[unit]
        if not size.reduce:
            return
        self.buffers[f"reduce {unit}"] = size.reduce
        self.reducing = unit
        self.look("backward", where)
        self.unreduced = max(self.unreduced - size.gradients, 0)
        if self.kept.replicated:
            self.buffers["sum over replicas"] = size.output
        adds = bool(self.kept.accumulated) and not self.kept.unsharded
        if self.kept.unsharded:
            self.gradients -= min(size.reduce, self.gradients)
        if not adds:
            self.gradients += size.shard
            self.sharded += size.shard
        self.look("backward", where, size.output if adds or size.output != size.shard else 0)

    def drop_reducing(self) -> None:
        self.buffers.pop(f"reduce {self.reducing}", None)
        self.buffers.pop("sum over replicas", None)
