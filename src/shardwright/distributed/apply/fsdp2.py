"""FSDP2: which modules are units, and ``fully_shard`` on each.

A *unit* is gathered and freed as one. Blocks are units; what lies outside of them belongs to the root's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from shardwright.distributed.apply.meta_chunks import MetaChunks
from shardwright.distributed.models.blocks import block_names, by_list, kept_gathered, owns_parameters, shared_parts
from shardwright.errors import PlanError


def shard_units(
    module: nn.Module,
    units: list[str],
    mesh: DeviceMesh,
    mp_policy: MixedPrecisionPolicy | None,
    offload_policy: OffloadPolicy | None = None,
    *,
    reshard: str = "default",
    budget: float = 0,
) -> None:
    """Make the named modules FSDP2 units, in place.

    A block that several lists share is one unit; so are the parts of several blocks that hold the same parameters.

    Args:
        units: the blocks of ``module``, or parts of them (:func:`.units.unit_names`).
        reshard: which of them reshard after forward (``ParallelConfig.reshard_after_forward``).
        budget: bytes of gathered parameters that may stay until backward (:func:`.kept_gathered`).
    """
    # What a block returns goes on in the compute dtype; only the root casts.
    inner = replace(mp_policy, output_dtype=None) if mp_policy is not None else None
    names = [name for name in units if not isinstance(module.get_submodule(name), FSDPModule)]
    sizes = {name: _gathered_bytes(module.get_submodule(name), inner) for name in names}
    kept = kept_gathered(by_list(names, block_names(module)), sizes, reshard, budget)
    for parts in shared_parts(module, names):
        shared = [module.get_submodule(name) for name in parts]
        _shard(shared, mesh, inner, offload_policy, reshard_after_forward=reshard != "never")
    for name in names:
        block = module.get_submodule(name)
        if not isinstance(block, FSDPModule):
            _shard([block], mesh, inner, offload_policy, reshard_after_forward=name not in kept)


def shard_ends(
    model: nn.Module,
    names: list[str],
    mesh: DeviceMesh,
    mp_policy: MixedPrecisionPolicy | None,
    offload_policy: OffloadPolicy | None = None,
    *,
    reshard: str = "default",
) -> None:
    """Make the embedding and the head units, in place.

    Args:
        names: of the two, as they run: backward begins with the last, which stays gathered unless all are to be freed.
    """
    inner = replace(mp_policy, output_dtype=None) if mp_policy is not None else None
    for name in names:
        keep = reshard == "never" or (reshard == "default" and name == names[-1])
        _shard([model.get_submodule(name)], mesh, inner, offload_policy, reshard_after_forward=not keep)


def _gathered_bytes(block: nn.Module, policy: MixedPrecisionPolicy | None) -> int:
    """Bytes that the block's parameters take on this rank when FSDP2 has gathered them."""
    dtype = policy.param_dtype if policy is not None else None
    local = [param.to_local() if isinstance(param, DTensor) else param for param in block.parameters()]
    return sum(param.numel() * (dtype or param.dtype).itemsize for param in local)


def set_prefetch(model: nn.Module, depth: int) -> None:
    """Let every block gather the ``depth`` blocks behind it in forward, before it in backward, in place.

    Nothing is set for 1: torch then prefetches the next block by itself, along the order of the real forward.
    """
    lists: dict[str, list[FSDPModule]] = {}
    for name in block_names(model):
        if isinstance(block := model.get_submodule(name), FSDPModule):
            lists.setdefault(name.rpartition(".")[0], []).append(block)
    for units in lists.values() if depth > 1 else ():
        for place, unit in enumerate(units):
            unit.set_modules_to_forward_prefetch(units[place + 1 : place + 1 + depth])
            unit.set_modules_to_backward_prefetch(units[max(place - depth, 0) : place][::-1])


def shard_root(
    model: nn.Module,
    mesh: DeviceMesh,
    mp_policy: MixedPrecisionPolicy | None,
    offload_policy: OffloadPolicy | None = None,
) -> None:
    """Make ``model`` the root unit, with every parameter that no other unit has."""
    _shard([model], mesh, mp_policy, offload_policy, reshard_after_forward=False)


def _shard(
    modules: list[nn.Module],
    mesh: DeviceMesh,
    mp_policy: MixedPrecisionPolicy | None,
    offload_policy: OffloadPolicy | None,
    *,
    reshard_after_forward: bool,
) -> None:
    """Make one unit of ``modules``: of one, or of several that hold the same parameters."""
    policy = mp_policy or MixedPrecisionPolicy()
    offload = offload_policy or OffloadPolicy()
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": policy,
        "offload_policy": offload,
        "shard_placement_fn": _placement(mesh),
    }
    with MetaChunks():
        for part in _parts_of_other_dtype(modules[0]):
            fully_shard(part, reshard_after_forward=reshard_after_forward, **options)
        fully_shard(modules if len(modules) > 1 else modules[0], reshard_after_forward=reshard_after_forward, **options)


def _placement(mesh: DeviceMesh) -> Callable[[nn.Parameter], Shard | None]:
    """FSDP2 cuts dim 0; a packed weight, whose dim 0 tensor parallelism cuts piece by piece, is cut along its other."""
    size = mesh.size(mesh.ndim - 1)

    def place(param: nn.Parameter) -> Shard | None:
        strided = isinstance(param, DTensor) and any(
            isinstance(placement, _StridedShard) and placement.dim == 0 for placement in param.placements
        )
        if not strided:
            return None
        if param.ndim < 2 or param.shape[1] % size:
            raise PlanError(
                f"A packed parameter of shape {tuple(param.shape)} cannot be sharded over {size} data-parallel ranks "
                "beside its tensor-parallel cut: its second dim must be a multiple of that."
            )
        return Shard(1)

    return place


def _parts_of_other_dtype(module: nn.Module) -> list[nn.Module]:
    """Submodules to shard as units of their own, because FSDP2 wants one dtype among a unit's trained parameters."""
    counts: Counter[torch.dtype] = Counter()
    for param in _managed(module):
        counts[param.dtype] += param.numel()
    if len(counts) < 2:
        return []
    main = counts.most_common(1)[0][0]
    parts: list[nn.Module] = []
    for part in _unsharded_modules(module):
        dtypes = {param.dtype for param in part._parameters.values() if param is not None and param.requires_grad}
        if len(dtypes) > 1 or (dtypes - {main} and part is module):
            raise PlanError(
                f"{type(part).__name__} owns trained parameters of several dtypes ({_names(dtypes | {main})}), which "
                "FSDP2 cannot put into one unit. Convert the model to one dtype, or freeze those parameters."
            )
        if dtypes - {main}:
            parts.append(part)
    return parts


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _managed(module: nn.Module) -> list[nn.Parameter]:
    """The trained parameters that ``fully_shard(module)`` would take: those of no unit below."""
    unique = {
        id(param): param
        for part in _unsharded_modules(module)
        if owns_parameters(part)
        for param in part._parameters.values()
        if param is not None and param.requires_grad
    }
    return list(unique.values())


def _unsharded_modules(module: nn.Module) -> list[nn.Module]:
    found = [module]
    for child in module.children():
        if not isinstance(child, FSDPModule):
            found += _unsharded_modules(child)
    return found
