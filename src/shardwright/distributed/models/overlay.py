"""Regions, and sequence parallelism as an overlay on a plan.

The overlay needs nothing from the plan but which layers read and write. In a block with tensor-parallel layers, the
children that hold them become regions, which gather the sequence and leave it split again; norms and other layers that
treat positions one by one stay on this rank's part. Children without tensor-parallel layers that may mix positions run
on the whole sequence.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from shardwright.distributed.models.resolved import READERS, WRITERS, RegionUse, ResolvedPlan, StyleUse
from shardwright.distributed.models.structure import block_names, is_norm, owns_parameters

# What may stand in a direct region, beside its one writer: work on this rank's share only.
_RANK_LOCAL = frozenset({"colwise", "packed_colwise", "fused_qkv", "kv_heads", "replicated_with_grad_allreduce"})


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def find_regions(modules: dict[str, nn.Module], resolved: ResolvedPlan) -> None:
    """Make the parent of every reader a region, so that its readers share their input's backward."""
    for name, use in list(resolved.modules.items()):
        if use.style in READERS or use.style in WRITERS:
            region = _parent(name)
            resolved.modules[name] = replace(use, region=region)
            resolved.regions.setdefault(region, RegionUse())


def overlay_sequence_parallel(model: nn.Module, modules: dict[str, nn.Module], resolved: ResolvedPlan) -> None:
    """Split the residual stream of every block that has tensor-parallel layers."""
    for block in block_names(model):
        styled = [name for name in _below(block, modules) if _is_tensor_parallel(name, resolved)]
        if not styled:
            continue
        resolved.blocks.append(block)
        own = resolved.modules.get(block)
        if own is not None and own.style == "replicate":
            resolved.modules[block] = replace(own, style="replicated_with_grad_allreduce")
        for child, module in modules[block].named_children():
            _overlay_child(f"{block}.{child}", module, block, modules, resolved)
    lists = {_parent(_parent(block)) for block in resolved.blocks}
    for name, use in list(resolved.modules.items()):
        inside = name.startswith(tuple(f"{block}." for block in resolved.blocks))
        explicit = use.style == "sequence_parallel" and not inside
        if explicit or (use.style == "replicate" and _parent(name) in lists and is_norm(modules[name])):
            resolved.modules[name] = StyleUse(
                "sequence_parallel", {"outside": True}, rule="norm of the residual stream"
            )


def _below(name: str, modules: dict[str, nn.Module]) -> list[str]:
    return [other for other in modules if other == name or other.startswith(f"{name}.")]


def _is_tensor_parallel(name: str, resolved: ResolvedPlan) -> bool:
    use = resolved.modules.get(name)
    return use is not None and (
        use.style in READERS | WRITERS | {"moe_tp_experts", "all_reduce", "mla_kv_a_proj"}
        or any(owner == name for owner, _ in resolved.parameters)
    )


def _overlay_child(
    name: str, module: nn.Module, block: str, modules: dict[str, nn.Module], resolved: ResolvedPlan
) -> None:
    names = _below(name, modules)
    use = resolved.modules.get(name)
    if any(_is_tensor_parallel(other, resolved) for other in names):
        if not list(module.children()) and use is not None:
            resolved.modules[name] = replace(use, sequence=True)  # a reader or writer directly below the block
        else:
            _make_region(name, names, block, resolved)
    elif use is not None and not list(module.children()):
        if use.style == "replicate" and (is_norm(module) or isinstance(module, nn.Linear)):
            resolved.modules[name] = StyleUse("sequence_parallel", rule="on this rank's part of the sequence")
        elif use.style == "replicate":
            resolved.regions[name] = RegionUse(block, direct=False)
    elif any(owns_parameters(modules[other]) for other in names):
        resolved.regions[name] = RegionUse(block, direct=False)
        resolved.notes.append(f"{name} runs on the whole sequence on every rank.")


def _make_region(name: str, names: list[str], block: str, resolved: ResolvedPlan) -> None:
    uses = {other: resolved.modules[other] for other in names if other in resolved.modules}
    writers = [other for other, use in uses.items() if use.style in ("rowwise", "packed_rowwise")]
    others = {use.style for other, use in uses.items() if other not in writers}
    bare = {style for (owner, _), style in resolved.parameters.items() if owner in uses}
    direct = (
        len(writers) == 1
        and others <= _RANK_LOCAL | ({"local_params"} if bare else set())
        and all(_parent(other) == name or use.style not in READERS | WRITERS for other, use in uses.items())
    )
    resolved.regions[name] = RegionUse(block, direct)
    if direct:
        resolved.modules[writers[0]] = replace(uses[writers[0]], sequence=True)
