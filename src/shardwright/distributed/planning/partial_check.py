"""What a plan forgot to say about slices: found in the autograd graph.

A copy of the model without its weights runs once. A module whose input can be traced back to the output of a
column-parallel layer, with no row-parallel or gathering layer in between, works on this rank's slice: the gradient of
its whole parameters is then a sum over the ranks, whatever the plan says. And a row-parallel layer whose input cannot
be traced back to such a layer gets it whole, as where a plan's glob means one kind of attention and matches another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.distributed.replay.inputs import candidate_inputs
from shardwright.distributed.replay.record import CODE_ERRORS, Mismatch
from shardwright.distributed.replay.runs import forward_run
from shardwright.distributed.replay.weightless import WeightlessCopy, weightless_copy


class _Boundary(torch.autograd.Function):
    """Marks the output of a module that makes its result whole for itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def modules_on_slices(
    model: nn.Module, candidates: set[str], is_sliced: Callable[[str], bool], is_summed: Callable[[str], bool]
) -> set[str]:
    """Those among ``candidates`` whose input is this rank's slice of something.

    Args:
        candidates: names of modules with whole parameters.
        is_sliced: whether a linear layer of this name hands on a slice.
        is_summed: whether a module of this name sums its ranks' results before it returns.
    """
    seen: dict[str, list[Any]] = {}

    def listen(weightless: WeightlessCopy, name: str, kind: str) -> None:
        if name not in weightless.stubs:
            weightless.model.get_submodule(name).register_forward_hook(_noting(seen.setdefault(kind, [])))

    for weightless in _runs(model, candidates, is_summed, listen):
        sliced = {
            found for found, nodes in seen.items() if any(_reaches(weightless, node, is_sliced) for node in nodes)
        }
        return {name for name in candidates if weightless.repeats.kind_of(name) in sliced}
    return set()


def layers_on_whole(
    model: nn.Module, candidates: set[str], is_sliced: Callable[[str], bool], is_summed: Callable[[str], bool]
) -> set[str]:
    """Those linear layers among ``candidates`` that run, and whose input is no slice of anything.

    Args:
        is_sliced, is_summed: as for :func:`modules_on_slices`.
    """
    seen: dict[str, list[Any]] = {}

    def listen(weightless: WeightlessCopy, name: str, kind: str) -> None:
        inputs = seen.setdefault(kind, [])
        weightless.model.get_submodule(name).register_forward_pre_hook(
            lambda module, args: inputs.append(args[0].grad_fn)
        )

    for weightless in _runs(model, candidates, is_summed, listen):
        whole = {
            kind for kind, nodes in seen.items() if nodes and not any(_reaches(weightless, n, is_sliced) for n in nodes)
        }
        return {name for name in candidates if weightless.repeats.kind_of(name) in whole}
    return set()


def _runs(
    model: nn.Module,
    candidates: set[str],
    is_summed: Callable[[str], bool],
    listen: Callable[[WeightlessCopy, str, str], None],
) -> Iterator[WeightlessCopy]:
    """Copies that have run, with ``listen`` called before for every copied name (and kind) of a candidate."""
    for inputs in candidate_inputs(model):
        weightless = weightless_copy(model)
        kind = weightless.repeats.kind_of
        kinds = {kind(name) for name in candidates}
        for name, module in weightless.model.named_modules():
            original = weightless.repeats.original_name(name)
            if is_summed(original):
                module.register_forward_hook(_mark)
            if kind(original) in kinds:
                listen(weightless, name, kind(original))
        try:
            forward_run(weightless, inputs)
        except (Mismatch, *CODE_ERRORS):
            continue
        yield weightless


def _mark(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return _Boundary.apply(output)
    if isinstance(output, tuple):
        return tuple(_Boundary.apply(x) if isinstance(x, Tensor) and x.requires_grad else x for x in output)
    return output


def _noting(nodes: list[Any]) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nodes.extend(x.grad_fn for x in args if isinstance(x, Tensor) and x.grad_fn is not None)

    return note


def _reaches(weightless: WeightlessCopy, start: Any, is_sliced: Callable[[str], bool]) -> bool:
    """Whether the graph behind ``start`` comes to a sliced layer before any other layer."""
    seen, open_ends = set(), [start]
    while open_ends:
        node = open_ends.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kind = type(node).__name__  # not its name(), which torch 2.11 does not have for functions written in Python
        call = node.call if kind == "_FullStubBackward" else None
        if call is not None:
            if is_sliced(weightless.repeats.original_name(call.name)):
                return True
        elif kind != "_BoundaryBackward":
            open_ends += [before for before, _ in node.next_functions]
    return False
