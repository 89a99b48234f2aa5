"""FSDP2: ``fully_shard`` on every unit that was decided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from shardwright._torch import leave_forwards_alone, state_of
from shardwright.distributed.apply.meta_chunks import MetaChunks
from shardwright.distributed.planning.decided import ROOT, DataPlan, Unit
from shardwright.distributed.runtime.shard_dim import data_parallel_dim, expert_data_parallel_dim


def apply_fsdp2(
    model: nn.Module,
    plan: DataPlan,
    mesh: DeviceMesh,
    mp_policy: MixedPrecisionPolicy | None,
    offload_policy: OffloadPolicy | None = None,
    expert_mesh: DeviceMesh | None = None,
) -> None:
    """Shard ``model`` over ``mesh`` in the units of ``plan``, in place.

    Args:
        mesh: one-dimensional for FSDP, ``replicate x shard`` for HSDP.
        expert_mesh: the same for units of experts.
        mp_policy: its ``output_dtype`` is left to the root: what a block returns goes on in the compute dtype.
    """
    policy = mp_policy or MixedPrecisionPolicy()
    inner = replace(policy, output_dtype=None)
    # What experts are called with is not cast: the weights of the choices may have another dtype than the tokens.
    of_experts = replace(inner, cast_forward_inputs=False)
    offload = offload_policy or OffloadPolicy()
    for unit in plan.units:
        if unit.experts:
            assert expert_mesh is not None
            _shard(model, unit, {"mesh": expert_mesh, "mp_policy": of_experts, "offload_policy": offload})
            continue
        own = policy if unit.modules == (ROOT,) else inner
        _shard(model, unit, {"mesh": mesh, "mp_policy": own, "offload_policy": offload})
    for name, (ahead, behind) in plan.prefetch.items():
        block: Any = model.get_submodule(name)
        block.set_modules_to_forward_prefetch([model.get_submodule(other) for other in ahead])
        block.set_modules_to_backward_prefetch([model.get_submodule(other) for other in behind])


def _shard(model: nn.Module, unit: Unit, options: dict[str, Any]) -> None:
    placement = _expert_placement(model, options["mesh"]) if unit.experts else _placement(model, options["mesh"])
    options = {**options, "shard_placement_fn": placement}
    options["reshard_after_forward"] = unit.reshard_after_forward
    modules = [model.get_submodule(name) for name in unit.modules]
    with MetaChunks():
        for name in unit.apart:
            fully_shard(model.get_submodule(name), **options)
        fully_shard(modules if len(modules) > 1 else modules[0], **options)
    if unit.gathered_around:
        leave_forwards_alone(state_of(modules[0]))


def _placement(model: nn.Module, mesh: DeviceMesh) -> Callable[[nn.Parameter], Shard | None]:
    size = mesh.size(mesh.ndim - 1)
    names = {id(param): name for name, param in model.named_parameters()}

    def place(param: nn.Parameter) -> Shard | None:
        if not isinstance(param, DTensor):
            return None
        dim = data_parallel_dim(names.get(id(param), "A parameter"), param.shape, param.placements, size)
        return Shard(dim) if dim else None

    return place


def _expert_placement(model: nn.Module, mesh: DeviceMesh) -> Callable[[nn.Parameter], Shard]:
    size = mesh.size(mesh.ndim - 1)
    names = {id(param): name for name, param in model.named_parameters()}

    def place(param: nn.Parameter) -> Shard:
        assert isinstance(param, DTensor)
        ep = param.device_mesh.size()
        return Shard(expert_data_parallel_dim(names.get(id(param), "A parameter"), param.shape, ep, size))

    return place
