"""Regions: which layers' outputs meet on the way to which layers' inputs.

Every stub call has an *out port* and an *in port*. A port is connected to another when a tensor flows from the first to
the second without passing another stub. The connected sets are the regions: ``{q, k, v} -> {o}``, ``{gate, up} ->
{down}``, and one large set, the residual stream, that all writers write into and all readers read from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.distributed.replay.record import Call, FullRun
from shardwright.distributed.replay.runs import Record
from shardwright.distributed.replay.weightless import WeightlessCopy

Key = tuple[str, int]
OUTPUT: Key = ("", -1)
# What a rank's share depends on: call key or parameter name -> where a change would change it.
Masks = dict[Any, Tensor]


@dataclass(frozen=True)
class Region:
    """One connected set of ports.

    Attributes:
        outs: calls whose output flows into it, in order.
        ins: calls whose input flows out of it, in order.
        feeds: in port -> the out ports that reach it.
        parameters: copied names of the parameters that take part in it.
        is_stream: the model's own output hangs on it, so it is whole on every rank.
    """

    outs: tuple[Key, ...]
    ins: tuple[Key, ...]
    feeds: dict[Key, frozenset[Key]]
    parameters: frozenset[str]
    is_stream: bool


def find_regions(weightless: WeightlessCopy, record: Record) -> list[Region]:
    """The regions of the model, in order of the first call that flows into each."""
    walker = _Walker(weightless.model)
    sources = {key: walker.sources(record.run.sources.get(key)) for key in record.run.calls}
    sources[OUTPUT] = walker.sources(*record.outputs)
    parent: dict[tuple[str, Key], tuple[str, Key]] = {}

    def root(port: tuple[str, Key]) -> tuple[str, Key]:
        while parent.setdefault(port, port) != port:
            parent[port] = parent[parent[port]]
            port = parent[port]
        return port

    for key, (calls, _) in sources.items():
        for source in calls:
            parent[root(("in", key))] = root(("out", source))
    together: dict[tuple[str, Key], tuple[list[Key], list[Key]]] = {}
    for key in record.run.calls:
        together.setdefault(root(("out", key)), ([], []))[0].append(key)
    for key, (calls, _) in sources.items():
        if calls:
            together[root(("in", key))][1].append(key)
    return [
        Region(
            tuple(outs),
            tuple(key for key in ins if key != OUTPUT),
            {key: sources[key][0] for key in ins},
            frozenset().union(*(sources[key][1] for key in ins)),
            OUTPUT in ins,
        )
        for outs, ins in together.values()
        if ins
    ]


def dependencies(
    weightless: WeightlessCopy, record: Record, region: Region, writers: list[Key], shares: Mapping[int, Any]
) -> dict[int, Masks]:
    """What every rank's share of the writers' inputs depends on.

    Args:
        shares: rank -> a function from a writer's key to the features of its input that the rank holds.

    Returns:
        Rank -> call key or parameter name -> bool tensor, True where a change would change the share.
    """
    calls, run = record.run.calls, record.run
    generator = torch.Generator().manual_seed(4)
    named = {name: weightless.model.get_parameter(name) for name in region.parameters}
    result: dict[int, Masks] = {}
    run.tracing = True
    for rank, share in shares.items():
        for call in calls.values():
            call.partial = None
        for param in named.values():
            param.grad = None
        tensors, grads = [], []
        for key in writers:
            source = run.sources.get(key)
            assert source is not None
            grad = torch.zeros_like(source)
            held = share(key)
            grad[..., held] = torch.randn(*source.shape[:-1], len(held), generator=generator)
            tensors.append(source)
            grads.append(grad)
        torch.autograd.backward(tensors, grads, retain_graph=True)
        masks: Masks = {}
        for key in region.outs:
            call = calls[key]
            masks[key] = _touched(call)
        for name, param in named.items():
            masks[name] = torch.zeros_like(param, dtype=torch.bool) if param.grad is None else param.grad != 0
        result[rank] = masks
    run.tracing = False
    return result


def _touched(call: Call) -> Tensor:
    width = call.output.shape[-1]
    if call.partial is None:
        return torch.zeros(width, dtype=torch.bool)
    return (call.partial != 0).reshape(-1, width).any(0)


class _Walker:
    """Finds the stubs and parameters that a tensor was made from, without passing another stub."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._memo: dict[Any, tuple[frozenset[Key], frozenset[str]]] = {}

    def sources(self, *tensors: Tensor | None) -> tuple[frozenset[Key], frozenset[str]]:
        calls: frozenset[Key] = frozenset()
        parameters: frozenset[str] = frozenset()
        for tensor in tensors:
            if tensor is not None and tensor.grad_fn is not None:
                found = self._walk(tensor.grad_fn)
                calls, parameters = calls | found[0], parameters | found[1]
        return calls, parameters

    def _walk(self, start: Any) -> tuple[frozenset[Key], frozenset[str]]:
        """Depth first without recursion: a graph of many blocks is deeper than Python's stack."""
        stack = [start]
        while stack:
            node = stack[-1]
            if node in self._memo:
                stack.pop()
                continue
            leaf = self._leaf(node)
            if leaf is not None:
                self._memo[node] = leaf
                stack.pop()
                continue
            parents = [parent for parent, _ in node.next_functions if parent is not None]
            waiting = [parent for parent in parents if parent not in self._memo]
            if waiting:
                stack += waiting
                continue
            found = [self._memo[parent] for parent in parents]
            self._memo[node] = (
                frozenset().union(*(f[0] for f in found)),
                frozenset().union(*(f[1] for f in found)),
            )
            stack.pop()
        return self._memo[start]

    def _leaf(self, node: Any) -> tuple[frozenset[Key], frozenset[str]] | None:
        if (call := FullRun.call_of(node)) is not None:
            return frozenset({call.key}), frozenset()
        variable = getattr(node, "variable", None)
        if variable is not None:
            name = self._names.get(id(variable))
            return frozenset(), frozenset() if name is None else frozenset({name})
        return None
