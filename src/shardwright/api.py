"""``shardwright.parallelize``: one call for users who do not know the functions under it."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from shardwright.distributed.apply.megatron_fsdp import Options
from shardwright.distributed.config import ParallelConfig, Precision
from shardwright.distributed.mesh import axis, make_mesh, refuse_context_parallel
from shardwright.distributed.steps import parallelize_with_fsdp2, parallelize_with_megatron_fsdp


def parallelize(model: nn.Module, config: ParallelConfig, mesh: DeviceMesh | None = None) -> nn.Module:
    """Spread ``model`` over the ranks as ``config`` says, in place.

    Start the ranks (``torchrun``), build the same model on each (on a device or on ``meta``), call this, then make an
    optimizer and train as on one GPU: ``loss.backward()`` is all that is needed.

    Args:
        mesh: a mesh from :func:`shardwright.make_mesh` to use; None makes one from ``config``.

    Returns:
        The same model; parameter names do not change, parameters are DTensors.

    Raises:
        ConfigError: the degrees do not fit the world size.
        PlanError: the plan does not fit the model or the mesh; the ranks hold different models.
        UnsupportedError: something that Shardwright does not do yet (context parallelism).
    """
    mesh = make_mesh(config) if mesh is None else mesh
    if config.engine == "megatron_fsdp":
        refuse_context_parallel(mesh)
        meta = any(param.is_meta for param in model.parameters())
        parallelize_with_megatron_fsdp(model, mesh, config, Options.from_config(config, meta=meta))
        return model  # the package's wrapper stands behind its forward
    # One data-parallel rank in float32 has nothing to shard and nothing to cast.
    needless = axis(mesh, "dp_cp").size() == 1 and config.precision == Precision()
    return parallelize_with_fsdp2(
        model, mesh, config, mp_policy=None if needless else mixed_precision(config.precision)
    )


def mixed_precision(precision: Precision) -> MixedPrecisionPolicy:
    """FSDP2's policy for ``precision``; float32 throughout is no policy at all, and casts nothing."""
    if precision == Precision():
        return MixedPrecisionPolicy()
    dtypes = (getattr(torch, name) for name in (precision.param, precision.reduce, precision.output))
    return MixedPrecisionPolicy(*dtypes)
