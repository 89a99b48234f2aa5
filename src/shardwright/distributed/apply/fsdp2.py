"""FSDP2: ``fully_shard`` on every unit that was decided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from shardwright.distributed.apply.meta_chunks import MetaChunks
from shardwright.distributed.planning.decided import ROOT, DataPlan, Unit
from shardwright.distributed.runtime.shard_dim import data_parallel_dim


def apply_fsdp2(
    model: nn.Module,
    plan: DataPlan,
    mesh: DeviceMesh,
    mp_policy: MixedPrecisionPolicy | None,
    offload_policy: OffloadPolicy | None = None,
) -> None:
    """Shard ``model`` over ``mesh`` in the units of ``plan``, in place.

    Args:
        mesh: one-dimensional for FSDP, ``replicate x shard`` for HSDP.
        mp_policy: its ``output_dtype`` is left to the root: what a block returns goes on in the compute dtype.
    """
    policy = mp_policy or MixedPrecisionPolicy()
    inner = replace(policy, output_dtype=None)
    offload = offload_policy or OffloadPolicy()
    for unit in plan.units:
        own = policy if unit.modules == (ROOT,) else inner
        _shard(model, unit, {"mesh": mesh, "mp_policy": own, "offload_policy": offload})
    for name, (ahead, behind) in plan.prefetch.items():
        block: Any = model.get_submodule(name)
        block.set_modules_to_forward_prefetch([model.get_submodule(other) for other in ahead])
        block.set_modules_to_backward_prefetch([model.get_submodule(other) for other in behind])


def _shard(model: nn.Module, unit: Unit, options: dict[str, Any]) -> None:
    options = {**options, "shard_placement_fn": _placement(model, options["mesh"])}
    options["reshard_after_forward"] = unit.reshard_after_forward
    modules = [model.get_submodule(name) for name in unit.modules]
    with MetaChunks():
        for name in unit.apart:
            fully_shard(model.get_submodule(name), **options)
        fully_shard(modules if len(modules) > 1 else modules[0], **options)


def _placement(model: nn.Module, mesh: DeviceMesh) -> Callable[[nn.Parameter], Shard | None]:
    size = mesh.size(mesh.ndim - 1)
    names = {id(param): name for name, param in model.named_parameters()}

    def place(param: nn.Parameter) -> Shard | None:
        if not isinstance(param, DTensor):
            return None
        dim = data_parallel_dim(names.get(id(param), "A parameter"), param.shape, param.placements, size)
        return Shard(dim) if dim else None

    return place
