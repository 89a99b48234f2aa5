"""What the user can choose, and what it becomes in Megatron-FSDP."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from shardwright._torch import flatten, flattened_names
from shardwright.distributed.apply.megatron_fsdp.availability import installed
from shardwright.distributed.config import ParallelConfig
from shardwright.distributed.precision import Precision
from shardwright.errors import ConfigError, UnsupportedError

logger = logging.getLogger(__name__)

STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")


@dataclass(frozen=True)
class Options:
    """The arguments of ``nvfsdp_strategy_parallelize`` that are about Megatron-FSDP, under their own names.

    Attributes:
        nvfsdp_unit_modules: classes, or dotted paths to them, whose modules are gathered and released together. None:
            the model's repeated blocks.
        data_parallel_sharding_strategy: ``"no_shard"`` (like DDP), ``"optim"`` (ZeRO-1), ``"optim_grads"`` (ZeRO-2)
            or ``"optim_grads_params"`` (ZeRO-3).
        init_nvfsdp_with_meta_device: the model is on the meta device; build and initialise it module by module.
        grad_reduce_in_fp32: keep, and sum, the gradients in float32.
        preserve_fp32_weights: let the optimizer work on float32 weights, of which the model's are rounded copies.
        overlap_grad_reduce: reduce gradients during backward.
        overlap_param_gather: gather parameters ahead of their use.
        check_for_nan_in_grad: raise, on every rank, when a reduced gradient is not finite.
        average_in_collective: let NCCL divide, instead of dividing before the sum.
        disable_bucketing: one bucket for all parameters outside of units.
        calculate_per_token_loss: sum gradients over the data-parallel ranks instead of averaging them.
        keep_fp8_transpose_cache_when_using_custom_fsdp: for TransformerEngine's FP8 parameters.
        nccl_ub: NCCL user buffers; needs the allocator of Megatron-Core or Apex.
        fsdp_double_buffer: two persistent communication buffers instead of allocations.
        precision: dtypes of a step where they differ from the model's own. Not in the seed's interface; the engine's.
    """

    nvfsdp_unit_modules: Sequence[str | type[nn.Module]] | None = None
    data_parallel_sharding_strategy: str = "optim_grads_params"
    init_nvfsdp_with_meta_device: bool = False
    grad_reduce_in_fp32: bool = False
    preserve_fp32_weights: bool = False
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    check_for_nan_in_grad: bool = True
    average_in_collective: bool = False
    disable_bucketing: bool = False
    calculate_per_token_loss: bool = False
    keep_fp8_transpose_cache_when_using_custom_fsdp: bool = False
    nccl_ub: bool = False
    fsdp_double_buffer: bool = False
    dp_mesh_name: str = "dp"
    cp_mesh_name: str = "cp"
    tp_mesh_name: str = "tp"
    precision: Precision | None = None

    @classmethod
    def from_config(cls, config: ParallelConfig, *, meta: bool = False) -> Options:
        """The options of engine ``megatron_fsdp`` for a mesh of :func:`shardwright.distributed.mesh.make_mesh`.

        Args:
            meta: the model is on the meta device.

        Raises:
            UnsupportedError: ``config`` asks for replicas of the sharded model.
        """
        if config.dp_replicate > 1:
            raise UnsupportedError(
                f"dp_replicate is {config.dp_replicate}: hybrid sharding is not offered with engine: megatron_fsdp. "
                "Set dp_replicate to 1, or use engine: fsdp2."
            )
        return cls(
            dp_mesh_name="dp_shard",
            init_nvfsdp_with_meta_device=meta,
            check_for_nan_in_grad=False,
            precision=None if config.precision == Precision() else config.precision,  # nothing is cast
        )

    @property
    def shards_gradients(self) -> bool:
        return self.data_parallel_sharding_strategy in ("optim_grads", "optim_grads_params")

    @property
    def shards_optimizer(self) -> bool:
        return self.data_parallel_sharding_strategy != "no_shard"

    def check(self, mesh: DeviceMesh) -> None:
        """Raise for what cannot work on ``mesh``; warn, by name, of what has no effect.

        Raises:
            ConfigError: no such strategy, no such mesh axis, or options that exclude one another.
            UnsupportedError: ``nccl_ub`` without an allocator for it; double buffers with megatron-fsdp 0.5.
        """
        strategy = self.data_parallel_sharding_strategy
        if strategy not in STRATEGIES:
            raise ConfigError(
                f"data_parallel_sharding_strategy is {strategy!r}; it must be one of {', '.join(STRATEGIES)}."
            )
        if self.dp_mesh_name not in axis_names(mesh):
            raise ConfigError(
                f"The mesh has no axis {self.dp_mesh_name!r} to shard over (dp_mesh_name); it has "
                f"{', '.join(axis_names(mesh))}."
            )
        if self.init_nvfsdp_with_meta_device and not self.shards_optimizer:
            raise ConfigError(
                "init_nvfsdp_with_meta_device=True does not go with data_parallel_sharding_strategy='no_shard': the "
                "whole model stays on every rank, so build it there. Or choose a strategy that shards."
            )
        if self.average_in_collective and self.calculate_per_token_loss:
            raise ConfigError(
                "average_in_collective=True divides the summed gradients by the number of ranks and "
                "calculate_per_token_loss=True leaves them undivided. Choose one."
            )
        if self.nccl_ub and not _has_nccl_allocator():
            raise UnsupportedError(
                "nccl_ub=True needs an allocator for NCCL user buffers: megatron.core.nccl_allocator (Megatron-Core) "
                "or apex.contrib.nccl_allocator (Apex), and neither is installed. Install one, or set nccl_ub=False."
            )
        if (self.fsdp_double_buffer or self.nccl_ub) and installed() < (0, 6):
            raise UnsupportedError(
                "fsdp_double_buffer=True, which nccl_ub=True implies, fails with megatron-fsdp 0.5 where units differ "
                "(frozen parameters, other layers). Install megatron-fsdp 0.6, or set both to False."
            )
        if not self.overlap_grad_reduce and self.shards_gradients:
            logger.warning(
                "overlap_grad_reduce=False has no effect with data_parallel_sharding_strategy=%r: Megatron-FSDP always "
                "reduces during backward what it shards.",
                strategy,
            )
        if self.keep_fp8_transpose_cache_when_using_custom_fsdp and find_spec("transformer_engine") is None:
            logger.warning(
                "keep_fp8_transpose_cache_when_using_custom_fsdp=True has no effect: only TransformerEngine's FP8 "
                "parameters have such a cache, and transformer_engine is not installed."
            )

    def shard_axis(self, mesh: DeviceMesh) -> str:
        """The axis to shard over: ``dp``, or ``dp`` and ``cp`` flattened into one where ``cp`` is more than 1."""
        known = axis_names(mesh)
        if self.cp_mesh_name not in known or mesh[self.cp_mesh_name].size() == 1:
            return self.dp_mesh_name
        flat = f"{self.dp_mesh_name}_{self.cp_mesh_name}"
        if flat not in known:
            flatten(mesh[self.dp_mesh_name, self.cp_mesh_name], flat)
        return flat

    def tp_size(self, mesh: DeviceMesh) -> int:
        return mesh[self.tp_mesh_name].size() if self.tp_mesh_name in axis_names(mesh) else 1


def axis_names(mesh: DeviceMesh) -> list[str]:
    """The names of the axes of ``mesh``, flattened ones included."""
    return [*(mesh.mesh_dim_names or ()), *flattened_names(mesh)]


def _has_nccl_allocator() -> bool:
    return any(_importable(module) for module in ("megatron.core.nccl_allocator", "apex.contrib.nccl_allocator"))


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # one of the packages above it
        return False
