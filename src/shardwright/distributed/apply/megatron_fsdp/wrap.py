"""Builds the package's model from our options."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
from megatron_fsdp import FSDPDistributedIndex, MixedPrecisionPolicy
from megatron_fsdp.fully_shard import DistributedDataParallelConfig
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from shardwright.distributed.apply.megatron_fsdp.engine import ShardedModel
from shardwright.distributed.apply.megatron_fsdp.meta import initialised, initialiser_of
from shardwright.distributed.apply.megatron_fsdp.options import Options
from shardwright.distributed.apply.megatron_fsdp.precision import set_precision
from shardwright.distributed.apply.megatron_fsdp.tensors import Layout

_BUCKET_SIZE = 40_000_000  # elements of a bucket of parameters outside of units, as in Megatron-Core


def wrap(model: nn.Module, mesh: DeviceMesh, options: Options, units: Sequence[type[nn.Module]]) -> ShardedModel:
    """Shard ``model`` in place, and return the wrapper around it."""
    axis, tensor_parallel = options.shard_axis(mesh), options.tp_size(mesh) > 1
    layout = Layout(mesh[axis, options.tp_mesh_name] if tensor_parallel else mesh[axis], options.shards_optimizer)
    device = torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
    dtypes, exact = set_precision(model, options)
    meta = options.init_nvfsdp_with_meta_device
    with initialised(model, initialiser_of(model), device) if meta else nullcontext():
        return ShardedModel(
            model,
            layout=layout,
            check_gradients=options.check_for_nan_in_grad,
            exact=exact,
            dist_index=FSDPDistributedIndex(
                mesh,
                dp_shard_dim=axis,
                tp_dim=options.tp_mesh_name if tensor_parallel else None,
                expt_device_mesh=mesh,  # asked for modules below ".experts." and when averaging in collectives
            ),
            ddp_config=_config(options, str(dist.get_backend_config(mesh[axis].get_group()))),
            mixed_precision_policy=MixedPrecisionPolicy(
                main_params_dtype=dtypes.weights, main_grads_dtype=dtypes.grads, grad_comm_dtype=dtypes.grads
            ),
            fsdp_unit_modules=list(units),
            disable_bucketing=options.disable_bucketing,
            device=device,
            calculate_per_token_loss=options.calculate_per_token_loss,
            init_model_with_meta_device=meta,
            sync_model_each_microbatch=True,
        )


def _config(options: Options, backends: str) -> DistributedDataParallelConfig:
    return DistributedDataParallelConfig(
        data_parallel_sharding_strategy=options.data_parallel_sharding_strategy,
        overlap_grad_reduce=options.overlap_grad_reduce,
        overlap_param_gather=options.overlap_param_gather,
        average_in_collective=options.average_in_collective,
        keep_fp8_transpose_cache=options.keep_fp8_transpose_cache_when_using_custom_fsdp,
        nccl_ub=options.nccl_ub,
        fsdp_double_buffer=options.fsdp_double_buffer or options.nccl_ub,
        bucket_size=_BUCKET_SIZE,
        # To divide and to sum in one operation is something that only NCCL can do.
        gradient_reduce_div_fusion="cuda:nccl" in backends,
    )
