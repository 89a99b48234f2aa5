"""Mixture-of-experts modules whose experts are cut: every rank holds a slice of each expert."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import Placement

from shardwright.distributed.runtime import collectives as c
from shardwright.distributed.runtime.forward import Around, Forward, attributes_as, original_class
from shardwright.distributed.styles.base import LocalParameters, Style
from shardwright.distributed.styles.traffic import Sent, Site, backward, forward
from shardwright.errors import PlanError, sizes_that_work


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
    sums = True
    experts = True

    def sent(self, site: Site) -> Iterable[Sent]:
        """Hidden states (and routing weights) go to every rank's slice of the experts; the outputs are summed."""
        width, module = site.stream, site.module
        routed = len(inspect.signature(original_class(module).forward).parameters) > 2
        if not routed:  # then every expert is called on every token: [experts * tokens, features]
            width *= max((param.shape[0] for param in module._parameters.values() if param is not None), default=1)
        weights = [backward("all_reduce", site.experts_per_token)] if routed else []
        return [forward("all_reduce", width), backward("all_reduce", width), *weights]

    def around(self, module: nn.Module, mesh: DeviceMesh) -> Around:
        return _ExpertsForward(mesh)


class SummedOutput(TensorParallelExperts):
    """Any module whose own parameters are cut and whose output is this rank's part of a sum."""

    name = "all_reduce"
    experts = False


class GroupedGemm(Style):
    """Batched expert parameters ``[experts, ...]`` of which each rank holds whole experts."""

    name = "grouped_gemm"

    def placement(self, module: nn.Module, parameter: str) -> Placement:
        return Shard(0)


class _DispatchForward(_ExpertsForward):
    """Every rank runs the tokens of its own experts; hidden states are whole on every rank, so none is sent."""

    def __init__(self, experts: int, mesh: DeviceMesh) -> None:
        super().__init__(mesh)
        self.experts = experts

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        start, end = self.group.bounds(self.experts)

        def local(hidden: Tensor, index: Tensor, weights: Tensor) -> Any:
            mine = (index >= start) & (index < end)
            # A choice that is another rank's goes to the first expert here with weight 0: no output, no gradient.
            return forward(hidden, torch.where(mine, index - start, 0), torch.where(mine, weights, 0))

        with attributes_as(module, {"num_experts": end - start}):
            return super().__call__(module, local, args, kwargs)


class ExpertDispatch(TensorParallelExperts):
    """Experts that are spread over the ranks as wholes; called with hidden states, chosen experts and their weights."""

    name = "ep_dispatch_experts"

    def check(self, module: nn.Module, name: str, size: int) -> None:
        experts = module.__dict__.get("num_experts")
        if not isinstance(experts, int):
            raise PlanError(f"{name} has the style {self.name!r}, but no num_experts to spread over the ranks.")
        if experts % size:
            raise PlanError(
                f"{name} has {experts} experts, which {size} ranks do not divide. {sizes_that_work(experts, size)}"
            )

    def around(self, module: nn.Module, mesh: DeviceMesh) -> Around:
        return _DispatchForward(module.__dict__["num_experts"], mesh)


class SpreadExperts(Style):
    """Experts on ranks of their own, over an axis of their own (:mod:`shardwright.distributed.apply.expert_parallel`).

    Tensor parallelism has no part in them: what goes in and what comes out is whole on each of its ranks.
    """

    name = "expert_parallel"
    sums = True
    experts = True

    def placement(self, module: nn.Module, parameter: str) -> Placement:
        return Shard(0)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return module


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
