"""The collectives over the ``tp`` axis of one training step, read off the resolved plan.

A step is one forward and backward of a micro-batch, without recomputation. The rules are those of
:mod:`shardwright.distributed.styles`, whose real calls the tests count. How often each module runs, and which tensor
each layer reads, is read off the recorded run of the model. Where its code cannot be run, every module is taken to run
once, and layers of a region whose inputs have one width to read one tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

from shardwright.distributed.models.blocks import is_norm, owns_parameters
from shardwright.distributed.models.huggingface import experts_per_token
from shardwright.distributed.planning.decided import innermost
from shardwright.distributed.planning.resolved import ResolvedPlan
from shardwright.distributed.replay.reading import ModelReading
from shardwright.distributed.styles.linear import ColwiseLogits, features
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


def stack_of(block: str) -> str:
    """The name of the outermost list that a block is in: all blocks of an encoder are one stack."""
    return ".".join(takewhile(lambda part: not part.isdigit(), block.split(".")))


class _Step:
    """Goes through a resolved plan; every method yields the collectives of one kind of place."""

    def __init__(self, reading: ModelReading, resolved: ResolvedPlan, itemsize: int, summing: Sequence[str]) -> None:
        self.summing = summing
        self.modules = reading.modules
        self.recording = reading.recording()
        self.resolved = resolved
        self.itemsize = itemsize
        self.block_list = reading.blocks
        self.blocks = set(reading.blocks)
        self.registered = {name: place for place, name in enumerate(reading.modules)}
        self.head = reading.head
        self.experts_per_token = experts_per_token(reading.model)
        self.widths = {block: width for block in reading.blocks if (width := self.stream_width(block))}

    def collectives(self) -> Iterator[tuple[str, Collective]]:
        for name, use in self.resolved.modules.items():
            if use.inside:
                continue
            site = Site(self.modules[name], use.sequence, self.stream(name), self.experts_per_token)
            for sent in [*use.made.sent(site)] * self.runs(name):
                itemsize = FLOAT32 if sent.float32 else self.itemsize
                yield self.scope(name), Collective(sent.kind, sent.backward, sent.width * itemsize, cause=name)
        for name in self.readings():
            for collective in self.input(name):
                yield self.scope(name), collective
        for name in self.resolved.regions:
            for collective in [*self.region(name)] * self.runs(name):
                yield self.scope(name), collective
        yield from self.stream_moves()
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

    def runs(self, name: str) -> int:
        """How often a module runs in a micro-batch: 1 where the model's code could not be run."""
        recording = self.recording
        if recording is None or not name:
            return 1
        return recording.calls_of(name)

    def readings(self) -> list[str]:
        """A reader for each tensor that is read, in each region: those of one tensor share what reading it sends."""
        found: dict[tuple[Any, ...], str] = {}
        for name in self.modules:
            use = self.resolved.modules.get(name)
            if use is None or not (use.reads or (use.style == ColwiseLogits.name and not use.inside)):
                continue
            where = name if use.region is None else use.region
            for read in self.read_by(name):
                found.setdefault((where, *read), name)
        return list(found.values())

    def read_by(self, name: str) -> list[tuple[Any, ...]]:
        """What tells the tensors apart that a layer reads: the tensor, and which run of the region it was.

        Where the model's code could not be run, layers of one region read one tensor if their inputs have one width.
        """
        read = self.recording.read_by(name) if self.recording is not None else []
        if not read:
            return [(self.width_in(name), run) for run in range(self.runs(name))]
        runs = self.runs(self.resolved.modules[name].region or name)
        return [(id(tensor), call * runs // len(read)) for call, tensor in enumerate(read)]

    def place_of(self, name: str) -> int:
        """Its place in the order of calls; in the model where its code could not be run."""
        found = self.recording.place_of(name) if self.recording is not None else None
        return self.registered[name] if found is None else found

    def width_in(self, name: str) -> int:
        return features(self.modules[name], out=False)

    def input(self, name: str) -> Iterator[Collective]:
        """Handing a whole or gathered input to the readers of a region."""
        use = self.resolved.modules[name]
        region = self.resolved.regions.get(use.region or "")
        width = self.width_in(name)
        if use.sequence or (name == self.head and self.gathered_by_head is not None):
            yield self.forward("all_gather", width, name)
            yield self.backward("reduce_scatter", width, name)
        elif region is None or not region.direct or self.is_from_elsewhere(name, use.region):
            yield self.backward("all_reduce", width, name)

    def is_from_elsewhere(self, name: str, region: str | None) -> bool:
        """Whether a layer reads another tensor than the first layer of its region: another model's states, say."""
        beside = [other for other, use in self.resolved.modules.items() if use.region == region and use.reads]
        first = min(beside, key=self.place_of)
        return self.read_by(name)[:1] != self.read_by(first)[:1]

    def region(self, name: str) -> Iterator[Collective]:
        """A sequence-parallel region gathers its input, and its result is split again."""
        use = self.resolved.regions[name]
        if use.block is not None:
            yield self.forward("all_gather", self.stream(name), name)
            yield self.backward("reduce_scatter" if use.direct else "all_gather", self.stream(name), name)

    @cached_property
    def stacks(self) -> dict[str, list[str]]:
        """The blocks of every stack, in the order in which they run."""
        stacks: dict[str, list[str]] = {}
        for block in self.block_list:
            stacks.setdefault(stack_of(block), []).append(block)
        return stacks

    @cached_property
    def split_at_end(self) -> list[str]:
        """The stacks that hand on a part of the sequence."""
        return [stack for stack, blocks in self.stacks.items() if blocks[-1] in self.resolved.blocks]

    def end_of(self, stack: str) -> int:
        """The place of its last block in the order of calls."""
        return max(map(self.place_of, self.stacks[stack]))

    @cached_property
    def gathered_by_head(self) -> str | None:
        """The stack whose end the head takes in parts: nothing but norms of the stream lies between."""
        head = self.resolved.modules.get(self.head or "")
        if head is None or head.style != ColwiseLogits.name or not self.split_at_end:
            return None
        last = max(self.split_at_end, key=self.end_of)
        between = range(self.end_of(last) + 1, self.place_of(self.head or ""))
        others = (
            name
            for name, use in self.resolved.modules.items()
            if owns_parameters(self.modules[name]) and not use.options.get("outside") and self.place_of(name) in between
        )
        return None if any(others) else last

    def stream_moves(self) -> Iterator[tuple[str, Collective]]:
        """Between blocks on a part of the sequence and what needs it whole.

        Cutting a whole stream gathers its gradient. Gathering one cuts its gradient, which sends nothing.
        """
        split = set(self.resolved.blocks)
        for stack, blocks in self.stacks.items():
            for before, block in zip((None, *blocks), (*blocks, None), strict=True):
                if block in split and before not in split:
                    yield "", self.backward("all_gather", self.stream(str(block)), str(block))
                elif before in split and block not in split and (block or stack != self.gathered_by_head):
                    yield "", self.forward("all_gather", self.stream(str(before)), block or "output")

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
        """Norms outside of the blocks that see the stream while it is split: those called after the blocks beside."""
        found = []
        for name, use in self.resolved.modules.items():
            parent = name.rpartition(".")[0]
            beside = [stack for stack in self.split_at_end if stack.rpartition(".")[0] == parent]
            if use.options.get("outside") and any(self.place_of(name) > self.end_of(stack) for stack in beside):
                found.append(name)
        return found
