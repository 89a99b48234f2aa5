"""Styles of modules whose parameters stay whole, or whose parameters have styles of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import SequenceParallel

from shardwright.distributed.runtime import collectives as c
from shardwright.distributed.runtime.forward import Around, Forward, local_parameters, parameters_as
from shardwright.distributed.runtime.regions import SEQUENCE_DIM, sequence_sharded
from shardwright.distributed.styles.base import LocalParameters, Place, Style, written_number
from shardwright.distributed.styles.traffic import Sent, Site, backward
from shardwright.errors import PlanError


class _WholeForward(LocalParameters):
    """Does the same work on every rank, so an input that is split along the sequence is made whole first."""

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args = tuple(x.full_tensor() if isinstance(x, DTensor) else x for x in args)
        return super().__call__(module, forward, args, kwargs)


class Replicated(Style):
    """Whole on purpose; every rank computes the full gradient."""

    name = "replicate"

    def around(self, module: nn.Module, mesh: DeviceMesh) -> Around:
        return _WholeForward()


class ReplicatedPartialGradient(Style):
    """Whole, but its work is this rank's share: its gradient is summed (:mod:`.gradient_sum`)."""

    name = "replicated_with_grad_allreduce"
    rank_local = True
    partial_gradients = True


class _PartOfSumForward(LocalParameters):
    def __init__(self, mesh: DeviceMesh) -> None:
        self.first = c.Group.of(mesh).rank == 0

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors: dict[str, Any] = local_parameters(module)
        if not self.first and tensors.get("bias") is not None:
            tensors["bias"] = None
        with parameters_as(module, tensors):
            return forward(*args, **kwargs)


class PartOfSum(ReplicatedPartialGradient):
    """A replicated linear layer between a part of a sum and the sum: the first rank adds its bias, the others none."""

    name = "part_of_sum"

    def around(self, module: nn.Module, mesh: DeviceMesh) -> Around:
        return _PartOfSumForward(mesh)


class LocalParams(Style):
    """The owner of bare parameters that have styles of their own; its forward sees them as local tensors."""

    name = "local_params"


class _SequenceForward(Around):
    def __init__(self, mesh: DeviceMesh, *, outside: bool) -> None:
        self.mesh = mesh
        self.group = c.Group.of(mesh)
        self.outside = outside

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = local_parameters(module)
        if not self.outside or not args or not isinstance(args[0], DTensor):
            with parameters_as(module, tensors):
                return forward(*args, **kwargs)
        x, *others = args
        trained = [name for name, tensor in tensors.items() if tensor.requires_grad]
        if trained:
            tensors.update(zip(trained, c.sum_gradients([tensors[name] for name in trained], self.group), strict=True))
        with parameters_as(module, tensors):
            return sequence_sharded(forward(x.to_local(), *others, **kwargs), x.shape[SEQUENCE_DIM], self.mesh)


class SequenceParallelNorm(Style, SequenceParallel):
    """A module that treats every position on its own, run on this rank's part of the sequence.

    Args:
        outside: it stands outside of the blocks. What it gets there tells what to do: a DTensor is the residual stream
            behind the blocks, split along the sequence, and the gradients are summed here; a plain tensor is whole, and
            so are the gradients. Inside a block every input is a chunk, and the unit sums (:mod:`.gradient_sum`).
    """

    name = "sequence_parallel"
    partial_gradients = True
    parameters_only = True

    def __init__(self, *, outside: bool = False) -> None:
        SequenceParallel.__init__(self)
        self.outside = outside

    def specialised(self, place: Place) -> tuple[str, dict[str, Any]] | None:
        return None if place.sequence_parallel else ("replicate", {})

    def around(self, module: nn.Module, mesh: DeviceMesh) -> Around:
        return _SequenceForward(mesh, outside=self.outside)


class _MlaForward(LocalParameters):
    def __init__(self, rope_dim: int, mesh: DeviceMesh) -> None:
        self.rope_dim = rope_dim
        self.group = c.Group.of(mesh)

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        y = super().__call__(module, forward, args, kwargs)
        latent, rope = y.split([y.shape[-1] - self.rope_dim, self.rope_dim], dim=-1)
        return torch.cat([latent, c.copy_to_region(rope, self.group)], dim=-1)


class MlaKvA(Style):
    """The compressed key-value projection of multi-head latent attention, whole.

    Its output is a latent, which column-parallel layers read, and a rotary key that this rank's heads use directly: the
    rotary part's gradient is summed here (DeepSeek-AI 2024, "DeepSeek-V2").

    Args:
        rope_dim: features of the rotary part, the last ones of the output.
    """

    name = "mla_kv_a_proj"
    sums_output_gradient = True
    for_adapted = True

    def __init__(self, rope_dim: int | None = None) -> None:
        self.rope_dim = rope_dim

    @classmethod
    def written_options(cls, argument: str) -> dict[str, Any] | None:
        return written_number("rope_dim", argument)

    def specialised(self, place: Place) -> tuple[str, dict[str, Any]] | None:
        if self.rope_dim is not None:
            return None
        if place.rotary_width is None:
            raise PlanError(
                f"{place.name} has the style {self.name!r}, but the model's config has no qk_rope_head_dim."
            )
        return self.name, {"rope_dim": place.rotary_width}

    def sent(self, site: Site) -> Iterable[Sent]:
        assert self.rope_dim is not None
        return [backward("all_reduce", self.rope_dim)]

    def around(self, module: nn.Module, mesh: DeviceMesh) -> Around:
        if self.inside:
            return LocalParameters()
        if self.rope_dim is None:
            raise PlanError("'mla_kv_a_proj' needs rope_dim, the number of rotary features in the layer's output.")
        return _MlaForward(self.rope_dim, mesh)
