"""From the segments of a short model to those of the whole one: what stands for many blocks is repeated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

from shardwright.estimate.trace.kernels import Kernel, Sending
from shardwright.estimate.trace.live import Segment
from shardwright.estimate.trace.short import Short


@dataclass(frozen=True)
class Part:
    """A segment at its place in a step of the whole model.

    Attributes:
        where: name of the block; ``""`` for what lies outside of the blocks.
    """

    where: str
    segment: Segment


def whole_step(short: Short, segments: Iterable[Segment]) -> list[Part]:
    """The parts of a forward and backward of the whole model, in their order."""
    joined = list(_joined(list(segments)))
    if short.decided.compiled:
        joined = _as_compiled(joined, keeps_inputs=not short.decided.recomputed)
    parts: list[Part] = []
    for (name, backward), run in groupby(joined, key=lambda segment: (_list_of(segment.name), segment.backward)):
        found = list(run)
        if not name:
            parts += [Part("", segment) for segment in found]
        else:
            parts += _repeated(short, name, found, backward=backward)
    return parts


def _joined(segments: list[Segment]) -> Iterator[Segment]:
    """Without the gaps between two blocks of one list: they belong to the block that ran before."""
    held: Segment | None = None
    for place, segment in enumerate(segments):
        following = segments[place + 1] if place + 1 < len(segments) else None
        gap = (
            held is not None
            and following is not None
            and not segment.name
            and held.name
            and _list_of(held.name) == _list_of(following.name)
            and held.backward == segment.backward == following.backward
        )
        if gap and held is not None:
            held = join(held, segment)
            continue
        if held is not None:
            yield held
        held = segment
    if held is not None:
        yield held


def scaled(part: Part, rows: int) -> Part:
    """A part of one sequence as one of ``rows``: all but the gradients of parameters is so many times as much."""
    segment = part.segment
    kernels: Counter[Kernel] = Counter()
    sent: Counter[Sending] = Counter()
    for kernel, count in segment.kernels.items():
        kernels[replace(kernel, flops=kernel.flops * rows, bytes=kernel.bytes * rows)] += count
    for sending, count in segment.sent.items():
        sent[replace(sending, bytes=sending.bytes * rows)] += count
    made = replace(
        segment,
        delta=segment.delta * rows,
        peak=(segment.peak - segment.gradients) * rows + segment.gradients
        if segment.peak > segment.gradients
        else segment.peak,
        input=segment.input * rows,
        kernels=kernels,
        sent=sent,
    )
    return replace(part, segment=made)


def join(first: Segment, second: Segment) -> Segment:
    """Two segments that follow each other, as one."""
    return replace(
        first,
        delta=first.delta + second.delta,
        peak=max(first.peak, first.delta + first.gradients + second.peak),
        gradients=first.gradients + second.gradients,
        products_unread=first.products_unread + second.products_unread,
        kernels=first.kernels + second.kernels,
        sent=first.sent + second.sent,
    )


def _as_compiled(segments: list[Segment], *, keeps_inputs: bool) -> list[Segment]:
    """A compiled block keeps no result that backward does not read.

    Args:
        keeps_inputs: it keeps what its matrix products read, too: nothing says that it is recomputed.
    """
    forward = [segment for segment in segments if segment.name and not segment.backward]
    more = {each.name: each.products_read * keeps_inputs - each.products_unread for each in forward}
    return [
        replace(segment, delta=segment.delta + more.get(segment.name, 0) * (-1 if segment.backward else 1))
        for segment in segments
    ]


def _list_of(block: str) -> str:
    return block.rpartition(".")[0]


def _repeated(short: Short, name: str, run: list[Segment], *, backward: bool) -> list[Part]:
    """A run through the blocks of one list of the short model, as one through all blocks of the whole model's list."""
    repeated = short.repeats.lists.get(name)
    if repeated is None or len(repeated.kept) == len(repeated.kinds):
        return [Part(short.repeats.original_name(segment.name), segment) for segment in run]
    last: dict[str, list[Segment]] = {}
    for segment in run:
        last.setdefault(segment.name, []).append(segment)
    whole = short.repeats.original_name(name)
    order = range(len(repeated.kinds))
    found = []
    for index in reversed(order) if backward else order:
        block = f"{whole}.{index}"
        found += [Part(block, segment) for segment in last.get(f"{name}.{repeated.place_of(index)}", ())]
    return found
