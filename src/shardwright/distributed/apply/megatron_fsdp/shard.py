"""From a model (after tensor parallelism) to a sharded one, and from its optimizer to one over the shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from shardwright.distributed.apply.megatron_fsdp.availability import require
from shardwright.distributed.apply.megatron_fsdp.meta import initialiser_of
from shardwright.distributed.apply.megatron_fsdp.names import names_before_sharding
from shardwright.distributed.apply.megatron_fsdp.options import Options
from shardwright.distributed.apply.megatron_fsdp.units import unit_classes
from shardwright.distributed.config import ParallelConfig
from shardwright.errors import ConfigError, UnsupportedError

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Prepared:
    """What was found out before anything changed; :meth:`shard` does the work."""

    model: nn.Module
    mesh: DeviceMesh
    options: Options
    units: list[type[nn.Module]]
    optimizer: Optimizer | None
    optimizer_names: list[list[str]]  # of the optimizer's parameters, by group

    @property
    def unit_names(self) -> list[str]:
        """The names of the units: the modules that gather their parameters for themselves."""
        return [name for name, module in self.model.named_modules() if isinstance(module, tuple(self.units))]

    def shard(self) -> tuple[nn.Module, Optimizer | None]:
        """Shard the model, whose parameters may have become DTensors on the ``tp`` mesh since, and the optimizer.

        A collective over all ranks of the mesh.

        Returns:
            The package's wrapper around the model (the model itself, called directly, does the same), and the
            optimizer, the same object.
        """
        from shardwright.distributed.apply.megatron_fsdp.optimizer import attach
        from shardwright.distributed.apply.megatron_fsdp.wrap import wrap

        sharded = wrap(self.model, self.mesh, self.options, self.units)
        if self.optimizer is not None:
            attach(sharded, self.optimizer, self.optimizer_names)
        return sharded, self.optimizer


def check_config(config: ParallelConfig, device_type: str) -> None:
    """Raise UnsupportedError unless ``config``, with this engine, can run on ``device_type``; needs no ranks."""
    require(device_type)
    Options.from_config(config)


def prepare(
    model: nn.Module,
    mesh: DeviceMesh,
    optimizer: Optimizer | None = None,
    options: Options | None = None,
    blocks: Sequence[str] | None = None,
) -> Prepared:
    """Check that ``model`` can be sharded over ``mesh``. Changes nothing and communicates nothing.

    Called before tensor parallelism, which replaces the parameters that ``optimizer`` holds.

    Args:
        blocks: as for :func:`.units.unit_classes`.

    Raises:
        UnsupportedError: the package or a GPU is missing, or the model has something that it cannot shard.
        ConfigError: options, units, mesh or optimizer that do not fit.
    """
    options = options or Options()
    require(mesh.device_type)
    options.check(mesh)
    meta = any(param.is_meta for param in model.parameters())
    if meta != options.init_nvfsdp_with_meta_device:
        raise ConfigError(
            f"init_nvfsdp_with_meta_device is {options.init_nvfsdp_with_meta_device}, but the model is "
            f"{'' if meta else 'not '}on the meta device. Set it to {meta}."
        )
    if meta:
        initialiser_of(model)
    for name, param in model.named_parameters():
        if param.ndim == 0:
            raise UnsupportedError(f"{name} has no dims, so it cannot be sharded. Give it one dim, with one element.")
        if param.dtype not in _DTYPES:
            raise UnsupportedError(
                f"{name} is {param.dtype}, but Megatron-FSDP has buffers for float32, bfloat16 and float16 only. "
                "Convert the model, or use engine: fsdp2."
            )
    names = [] if optimizer is None else names_before_sharding(model, optimizer)
    return Prepared(model, mesh, options, unit_classes(model, options.nvfsdp_unit_modules, blocks), optimizer, names)


def attach_optimizer(model: nn.Module, optimizer: Optimizer) -> Optimizer:
    """Give an optimizer over the parameters of a sharded ``model`` what saving and the package's own loop need.

    Training is exact without it. It adds the package's ``step`` and ``zero_grad``, exchanges raw parameters for the
    distributed ones should the optimizer hold any, and lets ``torch.distributed.checkpoint`` save its state.

    Args:
        model: sharded by this engine (the wrapper, or the model inside).

    Returns:
        The same object; groups, hyper-parameters and state are kept.

    Raises:
        ConfigError: ``model`` is not sharded by this engine, or ``optimizer`` holds other parameters.
    """
    from shardwright.distributed.apply.megatron_fsdp.optimizer import attach_by_identity

    attach_by_identity(model, optimizer)
    return optimizer
