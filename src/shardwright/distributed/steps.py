"""The steps in their order, for a mesh that exists: everything is decided and checked before any is taken.

Experts, tensor (and sequence) parallelism, activation checkpointing, compilation, then FSDP2 or Megatron-FSDP.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy

from shardwright._torch import concatenated
from shardwright.distributed.apply import megatron_fsdp
from shardwright.distributed.apply.activation_checkpointing import apply_activation_checkpointing
from shardwright.distributed.apply.adapters import let_merge, unmerge_disabled
from shardwright.distributed.apply.compile import apply_compile, check_backend
from shardwright.distributed.apply.context_parallel import apply_context_parallel
from shardwright.distributed.apply.expert_parallel import apply_expert_parallel, check_expert_shards, let_mix
from shardwright.distributed.apply.fsdp2 import apply_fsdp2
from shardwright.distributed.apply.fused_kernels import check_fused_kernels
from shardwright.distributed.apply.generation import generate_together
from shardwright.distributed.apply.guards.agreement import check_agreement
from shardwright.distributed.apply.guards.copies import refuse_copies
from shardwright.distributed.apply.guards.fresh import Parallelized, check_fresh, mark_parallelized
from shardwright.distributed.apply.guards.later_changes import look_for_changes, refuse_later_changes
from shardwright.distributed.apply.guards.optimizers import Replaced, check_no_optimizer
from shardwright.distributed.apply.guards.parameters import check_gradient_hooks, check_scalars
from shardwright.distributed.apply.guards.same_calls import compare_first_calls
from shardwright.distributed.apply.guards.unit_order import UnitOrder
from shardwright.distributed.apply.loss_tiles import apply_loss_tiles
from shardwright.distributed.apply.megatron_fsdp import Options as MegatronOptions
from shardwright.distributed.apply.mlp_tiles import apply_mlp_tiles
from shardwright.distributed.apply.parts import PART, open_to_losses
from shardwright.distributed.apply.passes import watch_passes
from shardwright.distributed.apply.quantized import check_quantized
from shardwright.distributed.apply.saving import save_and_load_together
from shardwright.distributed.apply.skipped_units import let_drop, pass_skipped_units
from shardwright.distributed.apply.tensor_parallel import apply_tensor_parallel
from shardwright.distributed.apply.trainers import connect_trainers
from shardwright.distributed.axes import EXPERTS
from shardwright.distributed.config import ParallelConfig, saved_every
from shardwright.distributed.mesh import (
    axis,
    axis_or_none,
    check_every_axis_used,
    data_parallel_mesh,
    expert_data_parallel_mesh,
)
from shardwright.distributed.models.attention import attention_kernels, register_context_attention
from shardwright.distributed.planning.context_plan import ContextPlan
from shardwright.distributed.planning.decide import decide
from shardwright.distributed.planning.decided import DecidedPlan
from shardwright.distributed.planning.sources import CustomPlan
from shardwright.distributed.planning.units import unit_names
from shardwright.distributed.replay.reading import ModelReading
from shardwright.distributed.runtime.checked import check_parameters

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Axes:
    """What a mesh calls its axes."""

    dp_replicate: str = "dp_replicate"
    dp_shard_cp: str = "dp_shard_cp"
    tp: str = "tp"
    ep: str = EXPERTS
    cp: str = "cp"


def parallelize_with_fsdp2(
    model: nn.Module,
    device_mesh: DeviceMesh,
    config: ParallelConfig,
    *,
    mp_policy: MixedPrecisionPolicy | None,
    offload_policy: OffloadPolicy | None = None,
    plan: CustomPlan | None = None,
    axes: Axes | None = None,
) -> nn.Module:
    """All steps, with FSDP2 as the last. The degrees of ``config`` are not read: the mesh has them.

    Args:
        mp_policy: None where FSDP2 is not wanted: one data-parallel rank, and no dtype to change.
    """
    axes = axes or Axes()
    check_fresh(model)
    check_no_optimizer(model)
    check_every_axis_used(device_mesh, (axes.dp_replicate, axes.dp_shard_cp, axes.tp))
    dp_mesh = data_parallel_mesh(device_mesh, axes.dp_replicate, axes.dp_shard_cp)
    tp, cp, ep = (_degree(device_mesh, name) for name in (axes.tp, axes.cp, axes.ep))
    _check_model(model, mp_policy, tp, cp)
    decided = decide(
        ModelReading(model),
        config,
        tp=tp,
        ep=ep,
        cp=cp,
        fsdp2=mp_policy is not None,
        compute_dtype=None if mp_policy is None else mp_policy.param_dtype,
        custom=plan,
    )
    replaced = Replaced(model)
    expert_mesh = None
    if decided.experts is not None:
        expert_mesh = expert_data_parallel_mesh(device_mesh, axes.dp_replicate)
        check_expert_shards(model, decided.experts, expert_mesh)
    _before_sharding(model, device_mesh, axes, decided)
    on = Parallelized(device_mesh, axes.tp, "fsdp2", decided.plan)
    mark_parallelized(model, on)
    if decided.data is not None or tp > 1:
        refuse_later_changes(model)
    if decided.data is not None:
        apply_fsdp2(model, decided.data, dp_mesh, mp_policy, offload_policy, expert_mesh)
        if decided.experts is not None:
            let_mix(model, decided.experts)
        shared = UnitOrder.watching(model, dp_mesh)
        watch_passes(model, _before_forward, shared.explaining)
        let_drop(model)
        refuse_copies(model)
    open_to_losses(model, decided.readable, axes.tp, fsdp2=decided.data is not None)
    if decided.data is not None and dp_mesh.size() > 1:
        pass_skipped_units(model, shared, decided.data, without=PART)
    check_parameters(model)
    replaced.raise_for_gradients(model)
    connect_trainers(on)
    return model


def _before_forward(model: nn.Module) -> None:
    look_for_changes(model)
    unmerge_disabled(model)


def _degree(mesh: DeviceMesh, name: str) -> int:
    found = axis_or_none(mesh, name)
    return 1 if found is None else found.size()


def _check_model(model: nn.Module, mp_policy: MixedPrecisionPolicy | None, tp: int, cp: int) -> None:
    casts = mp_policy is not None and mp_policy.param_dtype is not None
    check_quantized(model, tp=tp, engine="fsdp2" if mp_policy is not None else "", casts=casts)
    check_fused_kernels(model, tp * cp)
    if mp_policy is not None:
        check_gradient_hooks(model)
        check_scalars(model)


def parallelize_with_megatron_fsdp(
    model: nn.Module,
    device_mesh: DeviceMesh,
    config: ParallelConfig,
    options: MegatronOptions,
    optimizer: torch.optim.Optimizer | None = None,
    plan: CustomPlan | None = None,
) -> tuple[nn.Module, torch.optim.Optimizer | None]:
    """All steps, with Megatron-FSDP as the last. Returns the wrapped model and ``optimizer``."""
    check_fresh(model)
    check_no_optimizer(model, but=optimizer)
    check_quantized(model, tp=1, engine="megatron_fsdp", casts=False)
    check_gradient_hooks(model)
    reading = ModelReading(model)
    prepared = megatron_fsdp.prepare(model, device_mesh, optimizer, options, unit_names(reading))
    tp_mesh = axis(device_mesh, options.tp_mesh_name)
    check_fused_kernels(model, tp_mesh.size())
    decided = decide(reading, config, tp=tp_mesh.size(), fsdp2=False, custom=plan, own_units=prepared.unit_names)
    _before_sharding(model, device_mesh, Axes(tp=options.tp_mesh_name), decided)
    on = Parallelized(device_mesh, options.tp_mesh_name, "megatron_fsdp", decided.plan)
    mark_parallelized(model, on)
    connect_trainers(on)
    return prepared.shard()


def _before_sharding(model: nn.Module, mesh: DeviceMesh, axes: Axes, decided: DecidedPlan) -> None:
    """Everything up to the data-parallel sharding: experts, tensor and context parallelism, compilation."""
    if decided.compile_backend is not None:
        check_backend(decided.compile_backend)
    if decided.tensor is not None:
        check_gradient_hooks(model)
    check_agreement(model, mesh, repr(decided))
    if not dist.is_initialized() or dist.get_rank() == 0:
        for warning in decided.warnings:
            logger.warning("%s", warning)
    tp_mesh, ep_mesh = axis_or_none(mesh, axes.tp), axis_or_none(mesh, axes.ep)
    if decided.experts is not None and ep_mesh is not None:
        apply_expert_parallel(model, decided.experts, ep_mesh, tp_mesh)
    if decided.tensor is not None and tp_mesh is not None:
        apply_tensor_parallel(model, tp_mesh, decided.tensor, units=decided.summing)
        generate_together(model, tp_mesh)
        compare_first_calls(model, tp_mesh)
    if decided.context is not None:
        cp_mesh = axis(mesh, axes.cp)
        split_sequences(model, cp_mesh, tp_mesh, decided.context)
        generate_together(model, cp_mesh)
        compare_first_calls(model, cp_mesh, "context")
    if decided.tiles.head is not None:
        apply_loss_tiles(model, decided.tiles.head, decided.tiles.loss)
    apply_mlp_tiles(model, decided.tiles.mlps, decided.tiles.mlp)
    if decided.recomputed:
        selective = saved_every(decided.activation_checkpointing)
        apply_activation_checkpointing(model, decided.recomputed, selective=selective, offload=decided.offload)
    if decided.compile_backend is not None:
        apply_compile(model, decided.compiled, decided.compile_backend)
    save_and_load_together(model)
    let_merge(model)


def split_sequences(model: nn.Module, cp_mesh: DeviceMesh, tp_mesh: DeviceMesh | None, plan: ContextPlan) -> None:
    """Execute ``plan`` on ``model``, in place."""
    register_context_attention()
    kernels = attention_kernels(model, {name: use.kernel for name, use in plan.attention.items()})
    both = None if tp_mesh is None or tp_mesh.size() == 1 else concatenated(cp_mesh, tp_mesh)
    apply_context_parallel(model, cp_mesh, both, plan, kernels)
