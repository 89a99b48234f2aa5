"""Mixture-of-experts modules whose experts are cut: every rank holds a slice of each expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardwright.distributed.styles import collectives as c
from shardwright.distributed.styles.base import LocalParameters, Style
from shardwright.distributed.styles.forward import Around, Forward


class _ExpertsForward(LocalParameters):
    def __init__(self, mesh: DeviceMesh) -> None:
        self.group = c.Group.of(mesh)

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args = tuple(self._enter(x) for x in args)
        kwargs = {name: self._enter(x) for name, x in kwargs.items()}
        return c.reduce_from_region(super().__call__(module, forward, args, kwargs), self.group)

    def _enter(self, x: Any) -> Any:
        # Hidden states and routing weights alike: both meet this rank's slice of the experts only.
        if isinstance(x, Tensor) and torch.is_floating_point(x):
            return c.copy_to_region(x, self.group)
        return x


class TensorParallelExperts(Style):
    """Experts in batched parameters that are cut (each has a style of its own): the outputs are summed."""

    name = "moe_tp_experts"

    def around(self, module: nn.Module, mesh: DeviceMesh) -> Around:
        return _ExpertsForward(mesh)


class SummedOutput(TensorParallelExperts):
    """Any module whose own parameters are cut and whose output is this rank's part of a sum."""

    name = "all_reduce"


class _IdentityForward(Around):
    def __init__(self, mesh: DeviceMesh) -> None:
        self.size = mesh.size()

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, *others = args
        return forward(x / self.size, *others, **kwargs)


class IdentityExpert(Style):
    """An expert that returns its input, inside experts whose outputs are summed over the ranks."""

    name = "moe_identity_expert"

    def around(self, module: nn.Module, mesh: DeviceMesh) -> Around:
        return _IdentityForward(mesh)
