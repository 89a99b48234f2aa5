"""What a plan forgot to say about slices: found in the autograd graph of a recorded run.

A module whose input can be traced back to the output of a column-parallel layer, with no row-parallel or gathering
layer in between, works on this rank's slice: the gradient of its replicated parameters is then a sum over the ranks,
whatever the plan says. And a row-parallel layer whose input cannot be traced back to such a layer gets it whole, as
where a plan's glob means one kind of attention and matches another.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from shardwright.distributed.replay.reading import ModelReading, Recording
from shardwright.distributed.replay.record import FullRun

Fact = Callable[[str], bool]


def modules_on_slices(reading: ModelReading, candidates: set[str], is_sliced: Fact, is_summed: Fact) -> set[str]:
    """Those among ``candidates`` whose input is this rank's slice of something.

    Args:
        candidates: names of modules with replicated parameters.
        is_sliced: whether a linear layer of this name hands on a slice.
        is_summed: whether a module of this name sums its ranks' results before it returns.
    """
    recording = reading.recording()
    if recording is None:
        return set()
    inputs = _inputs(recording, candidates)
    graph = _Graph(recording, is_sliced, is_summed)
    sliced = {
        kind
        for kind, nodes in inputs.items()
        if any(graph.comes_from_slices(node) for name, node in nodes if name not in recording.weightless.stubs)
    }
    return {name for name in candidates if recording.weightless.repeats.kind_of(name) in sliced}


def layers_on_whole(reading: ModelReading, candidates: set[str], is_sliced: Fact, is_summed: Fact) -> set[str]:
    """Those linear layers among ``candidates`` that run, and whose input is no slice of anything.

    Args:
        is_sliced, is_summed: as for :func:`modules_on_slices`.
    """
    recording = reading.recording()
    if recording is None:
        return set()
    graph = _Graph(recording, is_sliced, is_summed)
    whole = {
        kind
        for kind, nodes in _inputs(recording, candidates).items()
        if nodes and not any(graph.comes_from_slices(node) for _, node in nodes)
    }
    return {name for name in candidates if recording.weightless.repeats.kind_of(name) in whole}


def _inputs(recording: Recording, candidates: Collection[str]) -> dict[str, list[tuple[str, Any]]]:
    """Kind of module -> copied names of its modules that are candidates, with where in the graph each input is from."""
    repeats = recording.weightless.repeats
    kinds = {repeats.kind_of(name) for name in candidates}
    found: dict[str, list[tuple[str, Any]]] = {}
    for name, nodes in recording.record.calls.inputs.items():
        if (kind := repeats.kind_of(repeats.original_name(name))) in kinds:
            found.setdefault(kind, []).extend((name, node) for node in nodes)
    return found


class _Graph:
    """The graph of a recorded run, as a plan cuts it."""

    def __init__(self, recording: Recording, is_sliced: Fact, is_summed: Fact) -> None:
        self.original = recording.weightless.repeats.original_name
        self.is_sliced = is_sliced
        outputs = recording.record.calls.outputs
        # What such modules return is whole, whatever is cut inside of them.
        self.ends = {node for name in outputs if is_summed(self.original(name)) for node in outputs[name]}

    def comes_from_slices(self, start: Any) -> bool:
        """Whether the graph behind ``start`` comes to a sliced layer before any other layer."""
        seen, open_ends = set(), [start]
        while open_ends:
            node = open_ends.pop()
            if node is None or node in seen or node in self.ends:
                continue
            seen.add(node)
            call = FullRun.call_of(node)
            if call is None:
                open_ends += [before for before, _ in node.next_functions]
            elif self.is_sliced(self.original(call.name)):
                return True
        return False
