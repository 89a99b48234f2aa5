"""Replicated parameters whose gradient is a sum over the tensor-parallel ranks.

A norm on this rank's heads, or on its part of the sequence, is the same weight on every rank but sees only that rank's
share of the work. The sum is part of the autograd graph: where a *scope* (the model, or an FSDP2 unit) begins, its
parameters of this kind pass through one function together, whose backward sums all their gradients in one collective.
So they are right under plain ``loss.backward()``, under accumulation and with any optimizer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shardwright.distributed.styles import collectives as c
from shardwright.distributed.styles.forward import Around, Forward, wrap_forward


class GradientSum:
    """The parameters of one scope, while its forward runs."""

    def __init__(self, group: c.Group) -> None:
        self.group = group
        self.members: list[tuple[str, str]] = []  # (module path below the scope, parameter name)
        self.tensors: dict[tuple[str, str], Tensor] = {}


class SummedParameters:
    """What one module knows: which of its parameters are summed, and where to find them while the scope runs."""

    def __init__(self, scope: GradientSum, path: str, names: tuple[str, ...]) -> None:
        self.scope = scope
        self.path = path
        self.names = names

    def local(self, name: str, param: DTensor) -> Tensor:
        """The local tensor of a summed parameter."""
        together = self.scope.tensors.get((self.path, name))
        if together is not None:
            return together
        # Outside of the scope's forward: a module called by itself, or recomputed in backward.
        local = param.to_local()
        return c.sum_gradients([local], self.scope.group)[0] if local.requires_grad else local


class SummingScope(Around):
    """Puts the parameters of a scope through one sum."""

    def __init__(self, scope: GradientSum) -> None:
        self.scope = scope

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        scope = self.scope
        local: dict[tuple[str, str], Tensor] = {}
        for path, name in scope.members:
            param = module.get_submodule(path)._parameters[name]
            if isinstance(param, DTensor) and param.requires_grad:
                local[path, name] = param.to_local()
        if local:
            scope.tensors = dict(zip(local, c.sum_gradients(list(local.values()), scope.group), strict=True))
        try:
            return forward(*args, **kwargs)
        finally:
            scope.tensors = {}


def sum_gradients_of(scope: nn.Module, members: dict[str, tuple[str, ...]], mesh: DeviceMesh) -> None:
    """Sum the gradients of these parameters over the ranks of ``mesh``.

    Args:
        scope: the module that holds them and whose forward they are used in.
        members: module path below ``scope`` -> names of the module's own parameters.
    """
    gradient_sum = GradientSum(c.Group.of(mesh))
    for path, names in members.items():
        scope.get_submodule(path).__dict__["_summed_parameters"] = SummedParameters(gradient_sum, path, names)
        gradient_sum.members += [(path, name) for name in names]
    wrap_forward(scope, SummingScope(gradient_sum))
