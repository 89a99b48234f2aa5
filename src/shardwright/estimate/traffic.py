"""The collectives over the ``tp`` axis of one training step, read off the resolved plan.

A step is one forward and backward of a micro-batch, without recomputation. The rules are those of
:mod:`shardwright.distributed.styles`, whose real calls the tests count. What a plan does not say is taken for granted:
readers in one region whose inputs have the same width read the same tensor; every module runs once, towers and
cross-attention too; sequence-parallel blocks follow one another (:func:`uncounted` tells where they do not).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from shardwright.distributed.models.blocks import is_norm
from shardwright.distributed.models.huggingface import experts_per_token
from shardwright.distributed.planning.decided import innermost
from shardwright.distributed.planning.resolved import ResolvedPlan
from shardwright.distributed.replay.reading import ModelReading
from shardwright.distributed.styles.linear import ColwiseGatherOutput, ColwiseLogits, features
from shardwright.distributed.styles.traffic import Site

FLOAT32 = 4


@dataclass(frozen=True)
class Collective:
    """One call over the ``tp`` ranks.

    Attributes:
        kind: ``"all_reduce"``, ``"all_gather"`` or ``"reduce_scatter"``.
        backward: in backward rather than in forward.
        token_bytes: size of the whole tensor per token; 0 where the size does not depend on the tokens.
        fixed_bytes: size of the whole tensor where it does not depend on the tokens.
        cause: the module that it is for.
    """

    kind: str
    backward: bool
    token_bytes: int = 0
    fixed_bytes: int = 0
    cause: str = ""

    def sent(self, size: int, tp: int) -> float:
        """Bytes that each of ``tp`` ranks sends for a tensor of ``size`` bytes, in a ring (Patarasuk, Yuan 2009)."""
        return size * (tp - 1) / tp * (2 if self.kind == "all_reduce" else 1)


def predict_traffic(
    reading: ModelReading, resolved: ResolvedPlan, itemsize: int, *, summing: Sequence[str] = ()
) -> dict[str, list[Collective]]:
    """The collectives of every block, by name; those outside of the blocks under ``""``.

    Args:
        itemsize: bytes of the dtype that the model computes in.
        summing: the modules that sum gradients of replicated parameters each for itself.
    """
    traffic: dict[str, list[Collective]] = {"": []}
    if resolved.tp == 1:
        return traffic
    step = _Step(reading, resolved, itemsize, summing)
    for scope, collective in step.collectives():
        traffic.setdefault(scope, []).append(collective)
    return traffic


def uncounted(reading: ModelReading, resolved: ResolvedPlan) -> str | None:
    """A sentence where whole blocks stand between sequence-parallel ones: what that moves is not predicted."""
    lists = {name.rpartition(".")[0] for name in resolved.blocks}
    split = set(resolved.blocks)
    whole = [name for name in reading.blocks if name.rpartition(".")[0] in lists and name not in split]
    if not whole:
        return None
    return (
        f"{len(whole)} blocks ({whole[0]} is the first) have no tensor-parallel layers: the sequence is gathered for "
        "them and split again behind them, which is not in the predicted collectives."
    )


class _Step:
    """Goes through a resolved plan; every method yields the collectives of one kind of place."""

    def __init__(self, reading: ModelReading, resolved: ResolvedPlan, itemsize: int, summing: Sequence[str]) -> None:
        self.summing = summing
        self.modules = reading.modules
        self.resolved = resolved
        self.itemsize = itemsize
        self.blocks = set(reading.blocks)
        self.head = reading.head
        self.experts_per_token = experts_per_token(reading.model)
        self.widths = {block: width for block in reading.blocks if (width := self.stream_width(block))}

    def collectives(self) -> Iterator[tuple[str, Collective]]:
        for name, use in self.resolved.modules.items():
            if use.inside:
                continue
            site = Site(self.modules[name], use.sequence, self.stream(name), self.experts_per_token)
            for sent in use.made.sent(site):
                itemsize = FLOAT32 if sent.float32 else self.itemsize
                yield self.scope(name), Collective(sent.kind, sent.backward, sent.width * itemsize, cause=name)
        for name in self.reading():
            for collective in self.input(name):
                yield self.scope(name), collective
        for name in self.resolved.regions:
            for collective in self.region(name):
                yield self.scope(name), collective
        yield from self.entries()
        yield from self.gradient_sums()

    def scope(self, name: str) -> str:
        """The block that ``name`` is in (or is), or ``""``."""
        while name and name not in self.blocks:
            name = name.rpartition(".")[0]
        return name

    def stream(self, name: str) -> int:
        """Width of the residual stream around ``name``."""
        return self.widths.get(self.scope(name)) or next(iter(self.widths.values()), 0)

    def stream_width(self, block: str) -> int:
        """The width of the first norm directly below a block, or what its first writer writes; 0 for neither."""
        norms = (child for child in self.modules[block].children() if is_norm(child))
        if width := next((param.numel() for norm in norms for param in norm.parameters()), 0):
            return width
        writers = (name for name, use in self.resolved.modules.items() if use.writes)
        return next((features(self.modules[name], out=True) for name in writers if self.scope(name) == block), 0)

    def forward(self, kind: str, width: int, cause: str) -> Collective:
        return Collective(kind, False, width * self.itemsize, cause=cause)

    def backward(self, kind: str, width: int, cause: str) -> Collective:
        return Collective(kind, True, width * self.itemsize, cause=cause)

    def reading(self) -> list[str]:
        """One reader for each input that is read: the first of its region and width."""
        layers: dict[str | None, list[str]] = {}
        for name in self.modules:
            use = self.resolved.modules.get(name)
            if use is not None and (use.reads or use.writes or (use.style == ColwiseLogits.name and not use.inside)):
                layers.setdefault(use.region, []).append(name)
        first: dict[tuple[str, int], str] = {}
        for region, names in layers.items():
            for name in names:
                style = self.resolved.modules[name].made
                # A last layer whose output is gathered is the one that writes the region, from an input of its own.
                writes = isinstance(style, ColwiseGatherOutput) and name == names[-1]
                if not style.writes:
                    first.setdefault((name if region is None or writes else region, self.width_in(name)), name)
        return list(first.values())

    def width_in(self, name: str) -> int:
        return features(self.modules[name], out=False)

    def input(self, name: str) -> Iterator[Collective]:
        """Handing a whole or gathered input to the readers of a region."""
        use = self.resolved.modules[name]
        region = self.resolved.regions.get(use.region or "")
        width = self.width_in(name)
        if use.sequence or (self.resolved.blocks and name == self.head):
            yield self.forward("all_gather", width, name)
            yield self.backward("reduce_scatter", width, name)
        elif use.region is None or region is None or not region.direct:
            yield self.backward("all_reduce", width, name)

    def region(self, name: str) -> Iterator[Collective]:
        """A sequence-parallel region gathers its input, and its result is split again."""
        use = self.resolved.regions[name]
        if use.block is not None:
            yield self.forward("all_gather", self.stream(name), name)
            yield self.backward("reduce_scatter" if use.direct else "all_gather", self.stream(name), name)

    def entries(self) -> Iterator[tuple[str, Collective]]:
        """The first sequence-parallel block of a list cuts a whole stream; without a head, the end gathers it."""
        lists = {name.rpartition(".")[0]: name for name in reversed(self.resolved.blocks)}
        for name in lists.values():
            yield "", self.backward("all_gather", self.stream(name), name)
        head = self.resolved.modules.get(self.head) if self.head is not None else None
        if lists and (head is None or head.style != ColwiseLogits.name):
            yield "", self.forward("all_gather", self.stream(next(reversed(lists.values()))), self.head or "output")

    def gradient_sums(self) -> Iterator[tuple[str, Collective]]:
        """Gradients of whole parameters that see a share of the work: summed together in float32, unit by unit."""
        sizes: dict[str, int] = {}
        for name, parameters in self.resolved.summed.items():
            unit = innermost(name, self.summing)
            sizes[unit] = sizes.get(unit, 0) + self.gradient_size(name, parameters)
        cause = "gradients of replicated parameters"
        for unit, size in sizes.items():
            if size:
                yield self.scope(unit), Collective("all_reduce", True, fixed_bytes=size, cause=cause)
        for name in self.norms_behind_blocks():
            if size := self.gradient_size(name, self.modules[name]._parameters):
                yield "", Collective("all_reduce", True, fixed_bytes=size, cause=name)

    def gradient_size(self, name: str, parameters: Iterable[str]) -> int:
        """Bytes of their gradients in float32, each with a number that says on how many ranks it was used."""
        found = (self.modules[name]._parameters[own] for own in parameters)
        return sum((param.numel() + 1) * FLOAT32 for param in found if param is not None and param.requires_grad)

    def norms_behind_blocks(self) -> list[str]:
        """Norms outside of the blocks that see the stream while it is split.

        Beside a list of blocks, a single norm is the final one, wherever it is registered; of several, those after it.
        """
        norms = [name for name, use in self.resolved.modules.items() if use.options.get("outside")]
        order = {name: place for place, name in enumerate(self.modules)}
        found = []
        for name in norms:
            parent = name.rpartition(".")[0]
            beside = [other for other in norms if other.rpartition(".")[0] == parent]
            blocks = [
                order[block] for block in self.resolved.blocks if block.startswith(f"{parent}." if parent else "")
            ]
            if len(beside) == 1 or order[name] > max(blocks, default=0):
                found.append(name)
        return found
