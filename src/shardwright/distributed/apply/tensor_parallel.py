"""Tensor and sequence parallelism: executes a resolved plan."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from shardwright.distributed.models.resolved import READERS, WRITERS, ResolvedPlan, StyleUse
from shardwright.distributed.models.ties import restore_ties
from shardwright.distributed.styles import make_style
from shardwright.distributed.styles.base import Style, distribute_parameter
from shardwright.distributed.styles.forward import wrap_forward
from shardwright.distributed.styles.gradient_sum import sum_gradients_of
from shardwright.distributed.styles.local_view import LocalAttributes
from shardwright.distributed.styles.outputs import PlainOutputs
from shardwright.distributed.styles.regions import Region, SequenceBlock, SequenceLength, SequenceRegion, SharedInput


def apply_tensor_parallel(
    model: nn.Module, mesh: DeviceMesh, resolved: ResolvedPlan, *, scopes: Iterable[str] = ()
) -> None:
    """Cut the parameters of ``model`` over ``mesh`` and wrap its modules, in place.

    Every parameter becomes a DTensor on ``mesh``; ties are kept. No data is sent: every rank cuts its own copy.

    Args:
        mesh: the one-dimensional ``tp`` mesh.
        resolved: what :func:`shardwright.distributed.models.resolve.resolve` found for this model and mesh size.
        scopes: modules that gather their parameters for themselves (FSDP2 units): gradients of replicated parameters
            are summed over the ranks once for each of them, and once for the rest.
    """
    shared = {name: SharedInput() for name in resolved.regions}
    lengths = {name: SequenceLength() for name in resolved.blocks}
    for (owner, name), style in resolved.parameters.items():
        module = model.get_submodule(owner)
        distribute_parameter(module, name, mesh, make_style(style).placement(module, name))
    for name, use in resolved.modules.items():
        _make(use, shared, lengths, _block_of(name, lengths))._apply(model.get_submodule(name), mesh)
    restore_ties(model, resolved.ties)
    for name, values in resolved.attributes.items():
        wrap_forward(model.get_submodule(name), LocalAttributes(values))
    _wrap_regions(model, mesh, resolved, shared, lengths)
    _sum_gradients(model, mesh, resolved, list(scopes))
    wrap_forward(model, PlainOutputs())


def _block_of(name: str, lengths: dict[str, SequenceLength]) -> str | None:
    parent = name.rpartition(".")[0]
    return parent if parent in lengths else None


def _make(
    use: StyleUse, shared: dict[str, SharedInput], lengths: dict[str, SequenceLength], block: str | None
) -> Style:
    options = dict(use.options)
    if use.region is not None and use.style in READERS | WRITERS:
        options["shared"] = shared[use.region]
    if use.sequence and use.style in READERS and block is not None:
        options["length"] = lengths[block]
    if use.sequence and use.style in WRITERS:
        options["sequence_output"] = True
    return make_style(use.style, **options)


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


def _sum_gradients(model: nn.Module, mesh: DeviceMesh, resolved: ResolvedPlan, scopes: list[str]) -> None:
    """Assign every summed parameter to the innermost scope that holds it."""
    members: dict[str, dict[str, tuple[str, ...]]] = {}
    for name, parameters in resolved.summed.items():
        inside = [scope for scope in scopes if name == scope or name.startswith(f"{scope}.")]
        scope = max(inside, key=len, default="")
        members.setdefault(scope, {})[name[len(scope) :].lstrip(".")] = parameters
    for scope, below in members.items():
        sum_gradients_of(model.get_submodule(scope), below, mesh)
