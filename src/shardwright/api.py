"""``shardwright.parallelize``: one call for users who do not know the functions under it."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from shardwright.distributed.apply.megatron_fsdp import Options
from shardwright.distributed.axes import AVERAGED
from shardwright.distributed.config import ParallelConfig
from shardwright.distributed.mesh import axis, check_degrees, make_mesh, refuse_context_parallel
from shardwright.distributed.planning.data import wants_fsdp2
from shardwright.distributed.precision import Precision
from shardwright.distributed.steps import parallelize_with_fsdp2, parallelize_with_megatron_fsdp
from shardwright.errors import ConfigError

logger = logging.getLogger(__name__)
_Model = TypeVar("_Model", bound=nn.Module)
_HALF = (torch.float16, torch.bfloat16)


def parallelize(model: _Model, config: ParallelConfig, mesh: DeviceMesh | None = None) -> _Model:
    """Spread ``model`` over the ranks as ``config`` says, in place.

    Start the ranks (``torchrun``), build the same model on each (on a device or on ``meta``), call this, then make an
    optimizer and train as on one GPU: ``loss.backward()`` is all that is needed.

    Args:
        model: a plain one, before anything else (an optimizer, a wrapper) has been made of it.
        mesh: a mesh from :func:`shardwright.make_mesh` to use, with the degrees of ``config``; None makes it.

    Returns:
        The same model; parameter names do not change, parameters are DTensors.

    Raises:
        ConfigError: the degrees do not fit the world size, or are not those of ``mesh``.
        PlanError: the plan does not fit the model or the mesh; the ranks hold different models; the model is
            parallelized already, or an optimizer holds its parameters.
        UnsupportedError: something that Shardwright does not do yet.
    """
    if not isinstance(config, ParallelConfig):
        raise ConfigError(
            f"config is a {type(config).__name__}; it must be a shardwright.ParallelConfig. "
            "ParallelConfig.from_dict(...) makes one of a mapping, from_yaml and from_json of text."
        )
    mesh = make_mesh(config) if mesh is None else mesh
    if config.engine == "megatron_fsdp":
        refuse_context_parallel(mesh, config.engine)
    check_degrees(config, mesh)
    config = config.with_(precision=config.precision.settled(_dtypes(model)))
    _warn_of_lost_updates(model)
    if config.engine == "megatron_fsdp":
        meta = any(param.is_meta for param in model.parameters())
        parallelize_with_megatron_fsdp(model, mesh, config, Options.from_config(config, meta=meta))
        return model  # the package's wrapper stands behind its forward
    # Without anything to shard, a settled precision says whether there is anything to cast.
    fsdp2 = wants_fsdp2(config, axis(mesh, AVERAGED).size())
    parallelize_with_fsdp2(model, mesh, config, mp_policy=mixed_precision(config.precision) if fsdp2 else None)
    return model


def mixed_precision(precision: Precision) -> MixedPrecisionPolicy:
    """FSDP2's policy for a settled ``precision``."""
    if precision == Precision():
        return MixedPrecisionPolicy()
    dtypes = (getattr(torch, name) for name in (precision.param, precision.reduce, precision.output))
    return MixedPrecisionPolicy(*dtypes)


def _dtypes(model: nn.Module) -> list[str]:
    """The floating-point dtypes of the model's parameters, the commonest first; quantized weights count for nothing."""
    counts: Counter[str] = Counter()
    for param in model.parameters():
        if param.is_floating_point() and param.element_size() > 1:
            counts[str(param.dtype).removeprefix("torch.")] += param.numel()
    return [dtype for dtype, _ in counts.most_common()]


def _warn_of_lost_updates(model: nn.Module) -> None:
    """Say that an optimizer would work on half-precision weights: exact, and seldom what is wanted."""
    low = Counter(param.dtype for param in model.parameters() if param.requires_grad and param.dtype in _HALF)
    if low and (not dist.is_initialized() or dist.get_rank() == 0):
        dtype = str(low.most_common(1)[0][0]).removeprefix("torch.")
        logger.warning(
            "%d trainable parameters of this %s are kept in %s, and so is the state of an optimizer that is made for "
            "them: small updates are lost in rounding. To train, keep them in float32 (model.float(), or "
            'dtype=torch.float32 where it is loaded) and compute in bfloat16 with ParallelConfig(precision="bf16").',
            low.total(),
            type(model).__name__,
            dtype,
        )
