"""Regions, and sequence parallelism as an overlay on a plan.

The overlay needs nothing from the plan but which layers read and write. In a block with tensor-parallel layers, the
children that hold them become regions, which gather the sequence and leave it split again; norms and other layers that
treat positions one by one stay on this rank's part. Children without tensor-parallel layers that may mix positions run
on the whole sequence, and so do blocks whose own code cannot run on a part (:mod:`.sequence_check`).
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import replace

from torch import nn

from shardwright.distributed.models.blocks import is_norm, numbers_to_globs, owns_parameters
from shardwright.distributed.planning.resolved import RegionUse, ResolvedPlan, StyleUse
from shardwright.distributed.planning.sequence_check import unsplittable_blocks
from shardwright.distributed.replay.reading import ModelReading
from shardwright.distributed.styles.replicated import LocalParams, ReplicatedPartialGradient, SequenceParallelNorm


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def find_regions(resolved: ResolvedPlan) -> None:
    """Make the parent of every reader a region, so that its readers share their input's backward."""
    for name, use in list(resolved.modules.items()):
        if use.reads or use.writes:
            region = _parent(name)
            resolved.modules[name] = replace(use, region=region)
            resolved.regions.setdefault(region, RegionUse())


def overlay_sequence_parallel(reading: ModelReading, resolved: ResolvedPlan, gathered: Container[str] = ()) -> None:
    """Split the residual stream of every block that has tensor-parallel layers and can run on a part of it.

    Args:
        gathered: children of blocks that gather more of the sequence for themselves (context parallelism). What their
            layers write is as long as what they see, and is cut behind them.
    """
    modules = reading.modules
    blocks = [
        name for name in reading.blocks if any(_is_tensor_parallel(other, resolved) for other in _below(name, modules))
    ]
    if not blocks:
        resolved.notes.append("Sequence parallelism does nothing: no block has tensor-parallel layers under this plan.")
        return

    def kind(name: str) -> str:
        return "region" if name in gathered else _child_kind(name, modules, resolved)

    whole = unsplittable_blocks(reading, blocks, lambda name: kind(name) == "region")
    for reason in dict.fromkeys(whole.values()):
        names = sorted({numbers_to_globs(name) for name, why in whole.items() if why == reason})
        resolved.notes.append(f"{', '.join(names)} stays on the whole sequence: {reason}.")
    resolved.whole_blocks = list(whole) if len(whole) < len(blocks) else []
    for block in blocks:
        if block not in whole:
            _overlay_block(block, modules, resolved, kind, gathered)
    _overlay_norms(modules, resolved)


def _overlay_block(
    block: str,
    modules: dict[str, nn.Module],
    resolved: ResolvedPlan,
    kind_of: Callable[[str], str],
    gathered: Container[str],
) -> None:
    resolved.blocks.append(block)
    own = resolved.modules.get(block)
    if own is not None and own.style == "replicate":
        resolved.modules[block] = replace(own, style=ReplicatedPartialGradient.name, origin="sequence parallelism")
    for child, _ in modules[block].named_children():
        name = f"{block}.{child}"
        kind, use = kind_of(name), resolved.modules.get(name)
        if kind == "region":
            _make_region(name, _below(name, modules), block, resolved, may_be_direct=name not in gathered)
        elif kind == "layer" and use is not None:
            resolved.modules[name] = replace(use, sequence=True)
        elif kind == "local" and use is not None and use.style == "replicate":
            rule = "on this rank's part of the sequence"
            resolved.modules[name] = StyleUse(SequenceParallelNorm.name, rule=rule, origin="sequence parallelism")


def _child_kind(name: str, modules: dict[str, nn.Module], resolved: ResolvedPlan) -> str:
    """What a child of a block is: ``region`` (gathers the sequence), ``layer`` (a reader or writer), ``local``."""
    module, use = modules[name], resolved.modules.get(name)
    leaf = not list(module.children())
    if any(_is_tensor_parallel(other, resolved) for other in _below(name, modules)):
        return "layer" if use is not None and (use.reads or use.writes) else "region"
    if leaf and (use is None or use.style != "replicate" or is_norm(module) or isinstance(module, nn.Linear)):
        return "local"
    return "region" if any(owns_parameters(modules[other]) for other in _below(name, modules)) else "local"


def _overlay_norms(modules: dict[str, nn.Module], resolved: ResolvedPlan) -> None:
    """Norms beside the lists of blocks take the stream as it comes."""
    lists = {_parent(_parent(block)) for block in resolved.blocks}
    inside = tuple(f"{block}." for block in resolved.blocks)
    for name, use in list(resolved.modules.items()):
        explicit = use.style == SequenceParallelNorm.name and not name.startswith(inside)
        if explicit or (use.style == "replicate" and _parent(name) in lists and is_norm(modules[name])):
            resolved.modules[name] = StyleUse(
                SequenceParallelNorm.name, {"outside": True}, "norm of the stream", "sequence parallelism"
            )


def _below(name: str, modules: dict[str, nn.Module]) -> list[str]:
    inside = (f"{name}.{path}".rstrip(".") for path, _ in modules[name].named_modules())
    return [other for other in inside if other in modules]  # a shared module goes by its first name


def _is_tensor_parallel(name: str, resolved: ResolvedPlan) -> bool:
    use = resolved.modules.get(name)
    return use is not None and (
        use.reads
        or use.writes
        or use.made.sums
        or use.made.sums_output_gradient
        or any(owner == name for owner, _ in resolved.parameters)
    )


def _make_region(name: str, names: list[str], block: str, resolved: ResolvedPlan, *, may_be_direct: bool) -> None:
    uses = {other: resolved.modules[other] for other in names if other in resolved.modules}
    writers = [other for other, use in uses.items() if use.writes and use.made.input_is_slice]
    owners = {owner for owner, _ in resolved.parameters}
    direct = (
        may_be_direct
        and len(writers) == 1
        # Beside its one writer, all work in a direct region is on this rank's share.
        and all(_rank_local(use, other in owners) for other, use in uses.items() if other not in writers)
        and all(_parent(other) == name or not (use.reads or use.writes) for other, use in uses.items())
    )
    resolved.regions[name] = RegionUse(block, direct)
    if direct:
        resolved.modules[writers[0]] = replace(uses[writers[0]], sequence=True)


def _rank_local(use: StyleUse, owns_cut_parameters: bool) -> bool:
    return use.made.rank_local or use.inside or (use.style == LocalParams.name and owns_cut_parameters)
