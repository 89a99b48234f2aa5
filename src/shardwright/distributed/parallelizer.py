"""The public module: what the original ``distributed.parallelizer`` offers, made exact.

Read from top to bottom it is the table of contents: which plan, does it fit, shard. The order of the steps is in
:mod:`shardwright.distributed.steps`.
"""

from __future__ import annotations

import logging

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, SequenceParallel

from shardwright.distributed.apply import megatron_fsdp
from shardwright.distributed.apply.fsdp2 import apply_fsdp2
from shardwright.distributed.apply.megatron_fsdp import Options as MegatronOptions
from shardwright.distributed.apply.unshard import unshard_fsdp2_model
from shardwright.distributed.config import ParallelConfig
from shardwright.distributed.models.blocks import block_names, numbers_to_globs
from shardwright.distributed.models.heads import check_heads
from shardwright.distributed.models.imports import import_class_from_path, import_classes_from_paths
from shardwright.distributed.plan import ParallelPlan
from shardwright.distributed.planning.data import decide_data
from shardwright.distributed.planning.layout import parameter_layouts
from shardwright.distributed.planning.resolve import resolve
from shardwright.distributed.planning.sources import brought_plan, choose_plan, huggingface_styles
from shardwright.distributed.planning.units import unit_names
from shardwright.distributed.replay.reading import ModelReading
from shardwright.distributed.steps import Axes, parallelize_with_fsdp2, parallelize_with_megatron_fsdp
from shardwright.distributed.styles import make_style

logger = logging.getLogger(__name__)

HAVE_NVFSDP: bool = megatron_fsdp.is_available()
"""Whether nvFSDP can be used: megatron-fsdp, its published name, or a real nvfsdp is installed."""

__all__ = [
    "HAVE_NVFSDP",
    "apply_fsdp2_sharding_recursively",
    "fsdp2_strategy_parallelize",
    "get_hf_tp_shard_plan",
    "get_lm_ac_layers",
    "import_class_from_path",
    "import_classes_from_paths",
    "nvfsdp_strategy_parallelize",
    "translate_to_torch_parallel_style",
    "unshard_fsdp2_model",
    "validate_tp_mesh",
]


# Which plan


def translate_to_torch_parallel_style(style: str) -> ParallelStyle:
    """The torch ``ParallelStyle`` of a style string: the original five and every one that transformers' plans use.

    Raises:
        PlanError: no such style; the message lists the known ones.
    """
    return make_style(style)


def get_hf_tp_shard_plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """The Hugging Face tensor-parallel plan of ``model`` as ``{glob over module names: ParallelStyle}``.

    Merges the class's ``_tp_plan``, the instance's and the inner text model's (with its prefix), later ones winning.
    The input embedding is added, sharded over the vocabulary, where the plan lacks it (a second table of its size,
    Gemma's embeddings for every layer, over the features); a head that would gather its output keeps the logits sharded
    (a DTensor, ``Shard(-1)``) for loss parallelism.

    Raises:
        PlanError: the model has no plan.
    """
    plan = huggingface_styles(model)
    return _styles_of(ParallelPlan(plan, frozenset(plan), source="huggingface"))


def _get_parallel_plan(
    model: nn.Module,
    sequence_parallel: bool = False,
    tp_shard_plan: dict[str, ParallelStyle] | str | None = None,
) -> dict[str, ParallelStyle]:
    """The plan that applies: ``tp_shard_plan``, or an optimized one, or Hugging Face's, or one derived from dataflow.

    Says (log, rank 0) which source was used and why.

    Args:
        sequence_parallel: also lay sequence parallelism over the plan: the norms of the residual stream are listed.
        tp_shard_plan: a dict of globs to styles, or a dotted path to one or to a function that returns one.

    Raises:
        PlanError: ``tp_shard_plan`` is none of these.
    """
    reading = ModelReading(model)
    plan = choose_plan(reading, None if tp_shard_plan is None else brought_plan(tp_shard_plan))
    styles = _styles_of(plan)
    if sequence_parallel:
        resolved = resolve(reading, plan, tp=1, sequence_parallel=True)
        for name, use in resolved.modules.items():
            if use.style == "sequence_parallel":
                styles.setdefault(numbers_to_globs(name), make_style("sequence_parallel"))
    return styles


def _styles_of(plan: ParallelPlan) -> dict[str, ParallelStyle]:
    """The styles of ``plan`` as objects, each of which knows it: passed in again, they mean the same."""
    styles = {glob: make_style(style) for glob, style in plan.styles.items()}
    for style in styles.values():
        style.plan = plan
    return dict(styles)


# Does it fit


def validate_tp_mesh(model: nn.Module, tp_mesh: DeviceMesh) -> None:
    """Check the model's attention heads against the size of ``tp_mesh``, before anything is touched.

    Query heads must divide. Key-value heads need not: where they do not, they are repeated exactly, which is logged.
    Heads are read from the text model's config, per layer where it states them so.

    Raises:
        PlanError: with the head counts and the tensor-parallel sizes that work.
    """
    if note := check_heads(model, tp_mesh.size()):
        logger.info("%s: %s", type(model).__name__, note)


def get_lm_ac_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated transformer blocks, of the text model and of vision and audio towers; ``[]`` when there are none."""
    return [model.get_submodule(name) for name in block_names(model)]


# Shard


def apply_fsdp2_sharding_recursively(
    module: nn.Module,
    mesh: DeviceMesh,
    mp_policy: MixedPrecisionPolicy | None,
    offload_policy: OffloadPolicy | None = None,
) -> None:
    """Make every repeated block in ``module`` an FSDP2 unit, in place.

    Each list's last block stays gathered after forward, since backward needs it at once. Lists of single layers are
    left alone; a block that several lists share is one unit. Of a block that is used while it does not run (its parent
    calls its children), the parts that are not become units.

    Args:
        mesh: one-dimensional for FSDP, ``replicate x shard`` for HSDP.
        mp_policy: its ``output_dtype`` is left to the root unit.
    """
    reading = ModelReading(module)
    dtype = None if mp_policy is None else mp_policy.param_dtype
    layouts = parameter_layouts(reading, None)
    plan = decide_data(reading, unit_names(reading), layouts, ParallelConfig(), compute_dtype=dtype, root=False)
    apply_fsdp2(module, plan, mesh, mp_policy, offload_policy)


def fsdp2_strategy_parallelize(
    model: nn.Module,
    device_mesh: DeviceMesh,
    mp_policy: MixedPrecisionPolicy | None = None,
    offload_policy: OffloadPolicy | None = None,
    sequence_parallel: bool = False,
    activation_checkpointing: bool = False,
    tp_shard_plan: dict[str, ParallelStyle] | str | None = None,
    dp_replicate_mesh_name: str = "dp_replicate",
    dp_shard_cp_mesh_name: str = "dp_shard_cp",
    tp_mesh_name: str = "tp",
) -> nn.Module:
    """Tensor (and sequence) parallelism, context parallelism (a ``cp`` axis), activation checkpointing, then FSDP2.

    Loss, logits, gradients and updated weights are those of one process, in any training loop.

    Args:
        model: on a device, with equal weights on every rank, or on ``meta``.
        device_mesh: the root mesh; the three names below are axes (or flattened axes) of it. Those of the replicas and
            of tensor parallelism may be missing where they would have one rank.
        mp_policy: None is bf16 parameters, fp32 reduction, fp32 output.
        tp_shard_plan: see :func:`_get_parallel_plan`.

    Returns:
        The same model, its parameter names unchanged.

    Raises:
        PlanError: the plan or the heads do not fit; the ranks hold different models.
        ConfigError: an axis that the mesh does not have, or one of its axes that nothing would use.
        UnsupportedError: a mesh with context parallelism, and what does not go together with it yet.
    """
    axes = Axes(dp_replicate_mesh_name, dp_shard_cp_mesh_name, tp_mesh_name)
    config = ParallelConfig(
        sequence_parallel=sequence_parallel, activation_checkpointing="full" if activation_checkpointing else "none"
    )
    mp_policy = mp_policy or MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)
    return parallelize_with_fsdp2(
        model, device_mesh, config, mp_policy=mp_policy, offload_policy=offload_policy, plan=tp_shard_plan, axes=axes
    )


def nvfsdp_strategy_parallelize(
    model: nn.Module,
    device_mesh: DeviceMesh,
    optimizer: torch.optim.Optimizer | None = None,
    nvfsdp_unit_modules: list[str] | None = None,
    tp_shard_plan: dict[str, RowwiseParallel | ColwiseParallel | SequenceParallel] | None = None,
    data_parallel_sharding_strategy: str = "optim_grads_params",
    init_nvfsdp_with_meta_device: bool = False,
    grad_reduce_in_fp32: bool = False,
    preserve_fp32_weights: bool = False,
    overlap_grad_reduce: bool = True,
    overlap_param_gather: bool = True,
    check_for_nan_in_grad: bool = True,
    average_in_collective: bool = False,
    disable_bucketing: bool = False,
    calculate_per_token_loss: bool = False,
    keep_fp8_transpose_cache_when_using_custom_fsdp: bool = False,
    nccl_ub: bool = False,
    fsdp_double_buffer: bool = False,
    dp_mesh_name: str = "dp",
    cp_mesh_name: str = "cp",
    tp_mesh_name: str = "tp",
) -> tuple[nn.Module, torch.optim.Optimizer | None]:
    """Tensor parallelism, then Megatron-FSDP (nvFSDP) over the data-parallel (and context-parallel) ranks.

    ``docs/engines.md`` says what each argument is mapped to. ``.grad`` and the optimizer work as in any torch model.

    Args:
        optimizer: over the parameters of ``model``; it holds the sharded ones afterwards, its groups unchanged.
        nvfsdp_unit_modules: dotted paths of classes; None takes the model's repeated blocks.
        tp_shard_plan: None chooses one, as :func:`fsdp2_strategy_parallelize` does.

    Returns:
        The wrapped model and the optimizer.

    Raises:
        UnsupportedError: megatron-fsdp or a GPU is missing (the message says what to install), or an argument that this
            version of it has no counterpart for.
        ConfigError, PlanError: what does not fit, before anything is changed.
    """
    options = MegatronOptions(
        nvfsdp_unit_modules=nvfsdp_unit_modules,
        data_parallel_sharding_strategy=data_parallel_sharding_strategy,
        init_nvfsdp_with_meta_device=init_nvfsdp_with_meta_device,
        grad_reduce_in_fp32=grad_reduce_in_fp32,
        preserve_fp32_weights=preserve_fp32_weights,
        overlap_grad_reduce=overlap_grad_reduce,
        overlap_param_gather=overlap_param_gather,
        check_for_nan_in_grad=check_for_nan_in_grad,
        average_in_collective=average_in_collective,
        disable_bucketing=disable_bucketing,
        calculate_per_token_loss=calculate_per_token_loss,
        keep_fp8_transpose_cache_when_using_custom_fsdp=keep_fp8_transpose_cache_when_using_custom_fsdp,
        nccl_ub=nccl_ub,
        fsdp_double_buffer=fsdp_double_buffer,
        dp_mesh_name=dp_mesh_name,
        cp_mesh_name=cp_mesh_name,
        tp_mesh_name=tp_mesh_name,
    )
    return parallelize_with_megatron_fsdp(model, device_mesh, ParallelConfig(), options, optimizer, tp_shard_plan)
