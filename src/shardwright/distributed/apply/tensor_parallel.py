"""Tensor and sequence parallelism: executes a resolved plan."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from shardwright.distributed.models.ties import restore_ties
from shardwright.distributed.planning.decided import innermost
from shardwright.distributed.planning.resolved import ResolvedPlan, StyleUse
from shardwright.distributed.runtime.forward import wrap_forward
from shardwright.distributed.runtime.gradient_sum import make_local
from shardwright.distributed.runtime.local_arguments import LocalArguments
from shardwright.distributed.runtime.local_sizes import LocalSizes
from shardwright.distributed.runtime.local_width import LocalWidth
from shardwright.distributed.runtime.outputs import PlainOutputs
from shardwright.distributed.runtime.regions import (
    Region,
    SequenceBlock,
    SequenceLength,
    SequenceRegion,
    SharedInput,
    WholeBlock,
)
from shardwright.distributed.styles import make_style
from shardwright.distributed.styles.base import Style, distribute_parameter


def apply_tensor_parallel(
    model: nn.Module, mesh: DeviceMesh, resolved: ResolvedPlan, *, units: Iterable[str] = ()
) -> None:
    """Cut the parameters of ``model`` over ``mesh`` and wrap its modules, in place.

    Every parameter becomes a DTensor on ``mesh``; ties are kept. No data is sent: every rank cuts its own copy.

    Args:
        mesh: the one-dimensional ``tp`` mesh.
        resolved: what :func:`shardwright.distributed.planning.resolve.resolve` found for this model and mesh size.
        units: modules that gather their parameters for themselves (FSDP2 units): gradients of replicated parameters are
            summed over the ranks once for each of them, and once for the rest.
    """
    shared = {name: SharedInput() for name in resolved.regions}
    lengths = {name: SequenceLength() for name in resolved.blocks}
    for (owner, name), style in resolved.parameters.items():
        module = model.get_submodule(owner)
        distribute_parameter(module, name, mesh, make_style(style).placement(module, name))
    for name, use in resolved.modules.items():
        _bound(name, use, resolved, shared, lengths)._apply(model.get_submodule(name), mesh)
    restore_ties(model, resolved.ties)
    for name, values in resolved.attributes.items():
        wrap_forward(model.get_submodule(name), LocalSizes(model.get_submodule(name), values))
    for name, cuts in resolved.arguments.items():
        wrap_forward(model.get_submodule(name), LocalArguments(model.get_submodule(name), cuts, mesh))
    for name, argument in resolved.widths.items():
        module = model.get_submodule(name)
        wrap_forward(module, LocalWidth(module, argument, shared[name], mesh.size()))
    _wrap_regions(model, mesh, resolved, shared, lengths)
    _make_local(model, mesh, resolved, list(units))
    wrap_forward(model, PlainOutputs(resolved.heads, mesh))


def _bound(
    name: str,
    use: StyleUse,
    resolved: ResolvedPlan,
    shared: dict[str, SharedInput],
    lengths: dict[str, SequenceLength],
) -> Style:
    if use.region is None:
        return use.made
    # A reader or writer directly below a block is in no region of that block; its parent is the block.
    length = lengths[resolved.regions[use.region].block or name.rpartition(".")[0]] if use.sequence else None
    return use.made.bound(shared[use.region], length)


def _wrap_regions(
    model: nn.Module,
    mesh: DeviceMesh,
    resolved: ResolvedPlan,
    shared: dict[str, SharedInput],
    lengths: dict[str, SequenceLength],
) -> None:
    for name, use in resolved.regions.items():
        module = model.get_submodule(name)
        if use.block is None:
            wrap_forward(module, Region(shared[name]))
        else:
            wrap_forward(module, SequenceRegion(module, shared[name], lengths[use.block], mesh, direct=use.direct))
    for name in resolved.blocks:
        module = model.get_submodule(name)
        wrap_forward(module, SequenceBlock(module, lengths[name], mesh))
    for name in resolved.whole_blocks:
        wrap_forward(model.get_submodule(name), WholeBlock())


def _make_local(model: nn.Module, mesh: DeviceMesh, resolved: ResolvedPlan, units: list[str]) -> None:
    """Give every unit its whole parameters as local tensors; a parameter belongs to the innermost unit around it."""

    def place(name: str) -> tuple[str, str]:
        unit = innermost(name, units)
        return unit, name[len(unit) :].lstrip(".")

    below: dict[str, dict[str, tuple[str, ...]]] = {}
    tables: dict[str, list[str]] = {}
    for name, parameters in resolved.replicated.items():
        unit, path = place(name)
        below.setdefault(unit, {})[path] = parameters
    for name, use in resolved.modules.items():
        if use.made.table:
            unit, path = place(name)
            tables.setdefault(unit, []).append(path)
    for unit in dict.fromkeys([*below, *tables]):
        prefix, places = f"{unit}." if unit else "", below.get(unit, {})
        summed = {path for path in places if (f"{prefix}{path}" if path else unit) in resolved.summed}
        make_local(model.get_submodule(unit), places, summed, tables.get(unit, []), mesh)
