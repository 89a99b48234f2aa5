"""Expert parallelism: executes an :class:`ExpertPlan`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from shardwright.distributed.planning.decided import ExpertPlan
from shardwright.distributed.runtime.expert_exchange import EXCHANGES, ExpertExchange, Ranks
from shardwright.distributed.runtime.expert_tensors import mix_with
from shardwright.distributed.runtime.forward import wrap_forward
from shardwright.distributed.runtime.listed_exchange import ListedExchange, NotElsewhere
from shardwright.distributed.runtime.shard_dim import expert_data_parallel_dim
from shardwright.distributed.styles.base import distribute_parameter


def check_expert_shards(model: nn.Module, plan: ExpertPlan, mesh: DeviceMesh) -> None:
    """Raise PlanError where FSDP2 cannot cut experts over ``mesh``, ``efsdp`` or ``dp_replicate x efsdp``."""
    for name in plan.parameters:
        expert_data_parallel_dim(name, model.get_parameter(name).shape, plan.ep, mesh.size(mesh.ndim - 1))


def apply_expert_parallel(
    model: nn.Module,
    plan: ExpertPlan,
    mesh: DeviceMesh,
    tp_mesh: DeviceMesh | None,
    exchanges: Mapping[str, type[ExpertExchange]] = EXCHANGES,
) -> None:
    """Cut the experts of ``model`` over ``mesh`` and let tokens travel to them, in place. No data is sent.

    Args:
        mesh: the one-dimensional ``ep`` mesh.
        tp_mesh: ranks that are called with the same tokens.
        exchanges: what runs around the experts, by the kind of their call.
    """
    # FSDP2 divides the sum over the ranks of ``efsdp`` by their number. A gradient has come from all of ``dp_shard x cp
    # x tp``, and is to be divided by the number of ``dp_shard x cp``.
    factor = (1 if tp_mesh is None else tp_mesh.size()) / mesh.size()
    for name, experts in plan.modules.items():
        module = model.get_submodule(name)
        for parameter in experts.parameters:
            path, _, own = parameter.rpartition(".")
            distribute_parameter(module.get_submodule(path), own, mesh, Shard(0))
        ranks = Ranks.of(mesh, tp_mesh)
        if experts.listed is not None:
            listed = [module.get_submodule(each) for each in experts.listed.loop.experts]
            shapes = {own: tuple(param.shape) for own, param in listed[0].named_parameters()}
            around = ListedExchange(experts.listed.loop, experts.listed.called, shapes, ranks, factor)
            wrap_forward(model.get_submodule(experts.listed.caller), around)
            for expert in listed:
                wrap_forward(expert, NotElsewhere())
            continue
        exchange = exchanges[experts.kind]
        wrap_forward(module, exchange(experts.count, experts.arguments, experts.parameters, ranks, factor))


def let_mix(model: nn.Module, plan: ExpertPlan) -> None:
    """Let norms and optimizers take the experts' shards together with all others, which lie on another mesh."""
    experts = [model.get_parameter(name) for name in plan.parameters]
    own = set(map(id, experts))
    others = [param for param in model.parameters() if id(param) not in own and isinstance(param, DTensor)]
    if not others:
        return
    mesh = max((param.device_mesh for param in others), key=lambda mesh: mesh.ndim)
    for param in experts:
        mix_with(mesh, param)
