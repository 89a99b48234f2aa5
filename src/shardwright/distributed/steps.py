"""The steps in their order, for a mesh that exists: what each works on is decided and checked before any is taken.

Tensor (and sequence) parallelism, activation checkpointing, compilation, then FSDP2 or Megatron-FSDP.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy

from shardwright.distributed.apply import megatron_fsdp
from shardwright.distributed.apply.activation_checkpointing import apply_activation_checkpointing
from shardwright.distributed.apply.compile import apply_compile, check_backend
from shardwright.distributed.apply.fsdp2 import set_prefetch, shard_ends, shard_root, shard_units
from shardwright.distributed.apply.generation import generate_together
from shardwright.distributed.apply.guards.agreement import check_agreement
from shardwright.distributed.apply.guards.parameters import check_gradient_hooks, check_scalars
from shardwright.distributed.apply.guards.same_calls import compare_first_calls
from shardwright.distributed.apply.megatron_fsdp import Options as MegatronOptions
from shardwright.distributed.apply.passes import watch_passes
from shardwright.distributed.apply.quantized import check_quantized
from shardwright.distributed.apply.saving import refuse_partial_saves
from shardwright.distributed.apply.tensor_parallel import apply_tensor_parallel
from shardwright.distributed.config import ParallelConfig
from shardwright.distributed.mesh import (
    axis,
    axis_or_none,
    check_every_axis_used,
    data_parallel_mesh,
    refuse_context_parallel,
)
from shardwright.distributed.models.blocks import block_names, by_list, every_nth, shared_parts
from shardwright.distributed.models.embedding_and_head import embedding_and_head_names
from shardwright.distributed.planning.planning import plan_and_resolve
from shardwright.distributed.planning.resolved import ResolvedPlan
from shardwright.distributed.planning.sources import CustomPlan, styles_of
from shardwright.distributed.planning.units import unit_names
from shardwright.distributed.styles.torch_styles import asks_for_sequence_parallel
from shardwright.errors import ConfigError

Plan = CustomPlan | None


@dataclass(frozen=True)
class Axes:
    """What a mesh calls its axes."""

    dp_replicate: str = "dp_replicate"
    dp_shard_cp: str = "dp_shard_cp"
    tp: str = "tp"


def parallelize_with_fsdp2(
    model: nn.Module,
    device_mesh: DeviceMesh,
    config: ParallelConfig,
    *,
    mp_policy: MixedPrecisionPolicy | None,
    offload_policy: OffloadPolicy | None = None,
    plan: Plan = None,
    axes: Axes | None = None,
) -> nn.Module:
    """All steps, with FSDP2 as the last. The degrees of ``config`` are not read: the mesh has them.

    Args:
        mp_policy: None where FSDP2 is not wanted: one data-parallel rank, and no dtype to change.
    """
    axes = axes or Axes()
    refuse_context_parallel(device_mesh)
    check_every_axis_used(device_mesh, (axes.dp_replicate, axes.dp_shard_cp, axes.tp))
    dp_mesh = data_parallel_mesh(device_mesh, axes.dp_replicate, axes.dp_shard_cp)
    tp_mesh = axis_or_none(device_mesh, axes.tp)
    sharded = mp_policy is not None
    casts = mp_policy is not None and mp_policy.param_dtype is not None
    tp = 1 if tp_mesh is None else tp_mesh.size()
    check_quantized(model, tp=tp, engine="fsdp2" if sharded else "", casts=casts)
    if sharded:
        check_gradient_hooks(model)
        check_scalars(model)
    ends = embedding_and_head_names(model) if sharded and config.shard_ends else []
    blocks = unit_names(model) if sharded or _one_by_one(config) else []
    shared = [name for parts in shared_parts(model, blocks) for name in parts]
    units = [*blocks, *shared, *ends] if sharded else []
    _before_sharding(model, device_mesh, tp_mesh, config, plan or config.plan, units, blocks)
    if sharded:
        reshard, budget = config.reshard_after_forward, config.keep_gathered_gib * 2**30
        shard_units(model, blocks, dp_mesh, mp_policy, offload_policy, reshard=reshard, budget=budget)
        shard_ends(model, ends, dp_mesh, mp_policy, offload_policy, reshard=reshard)
        shard_root(model, dp_mesh, mp_policy, offload_policy)
        set_prefetch(model, config.prefetch)
        watch_passes(model)
    return model


def parallelize_with_megatron_fsdp(
    model: nn.Module,
    device_mesh: DeviceMesh,
    config: ParallelConfig,
    options: MegatronOptions,
    optimizer: torch.optim.Optimizer | None = None,
    plan: Plan = None,
) -> tuple[nn.Module, torch.optim.Optimizer | None]:
    """All steps, with Megatron-FSDP as the last. Returns the wrapped model and ``optimizer``."""
    check_quantized(model, tp=1, engine="megatron_fsdp", casts=False)
    check_gradient_hooks(model)
    blocks = unit_names(model)
    prepared = megatron_fsdp.prepare(model, device_mesh, optimizer, options, blocks)
    tp_mesh = axis(device_mesh, options.tp_mesh_name)
    _before_sharding(model, device_mesh, tp_mesh, config, plan or config.plan, prepared.unit_names, blocks)
    return prepared.shard()


def _one_by_one(config: ParallelConfig) -> bool:
    """Whether blocks are recomputed or compiled one by one."""
    return config.activation_checkpointing != "none" or config.compile_backend is not None


def _before_sharding(
    model: nn.Module,
    mesh: DeviceMesh,
    tp_mesh: DeviceMesh | None,
    config: ParallelConfig,
    plan: Plan,
    units: list[str],
    blocks: list[str],
) -> None:
    """Everything up to the data-parallel sharding: tensor parallelism, activation checkpointing, compilation.

    Args:
        units: what gathers its parameters for itself.
        blocks: what is recomputed or compiled, if anything is.
    """
    if config.compile_backend is not None:
        check_backend(config.compile_backend)
    checkpointed = _checkpointed(by_list(blocks, block_names(model)), config)
    resolved = None if tp_mesh is None else _resolved(model, tp_mesh, plan, config.sequence_parallel)
    if resolved is not None:
        check_gradient_hooks(model)
    check_agreement(model, mesh, repr(resolved))
    if resolved is not None and tp_mesh is not None:
        # What gathers its parameters, or runs twice, sees to its whole parameters by itself.
        apply_tensor_parallel(model, tp_mesh, resolved, units=[*units, *checkpointed])
        generate_together(model, tp_mesh)
        compare_first_calls(model, tp_mesh)
    if checkpointed:
        apply_activation_checkpointing(model, checkpointed, selective=config.activation_checkpointing == "selective")
    if config.compile_backend is not None:
        apply_compile(model, blocks, config.compile_backend)
    refuse_partial_saves(model)


def _checkpointed(lists: dict[str, list[str]], config: ParallelConfig) -> list[str]:
    """The blocks that are recomputed."""
    n = config.checkpointed_every
    chosen = every_nth(lists, n)
    if n > 1 and not chosen:
        longest = max(map(len, lists.values()), default=0)
        raise ConfigError(
            f"activation_checkpointing is {config.activation_checkpointing!r}, but the model's longest list of blocks "
            f"has {longest}: nothing would be recomputed. Choose a smaller number, or none."
        )
    return chosen


def _resolved(
    model: nn.Module, tp_mesh: DeviceMesh, tp_shard_plan: Plan, sequence_parallel: bool
) -> ResolvedPlan | None:
    """The plan for this model and mesh, checked (heads too); None where there is one tensor-parallel rank."""
    if tp_mesh.size() == 1:
        return None
    sequence_parallel |= asks_for_sequence_parallel(styles_of(tp_shard_plan).values())
    return plan_and_resolve(model, tp_shard_plan, tp_mesh.size(), sequence_parallel=sequence_parallel)[1]
