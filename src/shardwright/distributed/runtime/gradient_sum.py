"""Whole parameters while the unit they belong to runs, and those among them whose gradient is a sum over the ranks.

A norm on this rank's heads, or on its part of the sequence, is the same weight on every rank but sees only that rank's
share of the work. The sum is part of the autograd graph: where a *unit* (an FSDP2 unit, or the model) begins, its
parameters of this kind pass through one function together, whose backward sums all their gradients in one collective.
So they are right under plain ``loss.backward()``, under accumulation and with any optimizer.

While the unit runs, its whole parameters are plain local tensors wherever code reads them: some modules use a child's
weight without calling the child. Tables that are cut over the vocabulary can be read so, too (:class:`.ShardedTable`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shardwright.distributed.runtime import collectives as c
from shardwright.distributed.runtime.forward import Around, Forward, wrap_forward
from shardwright.distributed.runtime.sharded_table import sharded_table

Place = tuple[str, str]  # module path below the unit, parameter name
Owner = tuple[nn.Module, str]  # the module itself, parameter name


class SummedParameters:
    """The parameters of one module whose gradients are summed, for when it is called by itself."""

    def __init__(self, group: c.Group, names: tuple[str, ...]) -> None:
        self.group = group
        self.names = names

    def local(self, param: DTensor) -> Tensor:
        local = param.to_local()
        return c.sum_gradients([local], self.group)[0] if local.requires_grad else local


class UnitParameters(Around):
    """Makes the whole parameters of a unit local while it runs."""

    eager = True  # its backward reads on how many ranks a parameter was used

    def __init__(self, mesh: DeviceMesh) -> None:
        self.group = c.Group.of(mesh)
        self.summed: list[Place] = []
        self.others: list[Place] = []
        self.tables: list[Place] = []

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        owners: dict[Place, dict[str, Any]] = {}
        local: dict[Place, Tensor] = {}
        for path, name in (*self.summed, *self.others, *self.tables):
            owner = module.get_submodule(path)._parameters
            param: Any = owner[name]
            # On two axes or more it is still FSDP2's: of a unit of its own below this one.
            if isinstance(param, DTensor) and param.device_mesh.ndim == 1:
                owners[path, name] = owner
                local[path, name] = sharded_table(param) if (path, name) in self.tables else param.to_local()
        summed = [place for place in self.summed if place in local and local[place].requires_grad]
        if summed:
            together = c.sum_gradients([local[place] for place in summed], self.group)
            local.update(zip(summed, together, strict=True))
        before = {place: owner[place[1]] for place, owner in owners.items()}
        _put(owners, local)
        try:
            return forward(*args, **kwargs)
        finally:
            _put(owners, before)

    def owners(self, unit: nn.Module) -> list[list[Owner]]:
        """The modules that its places are, for :meth:`follow`."""
        lists = (self.summed, self.others, self.tables)
        return [[(unit.get_submodule(path), name) for path, name in places] for places in lists]

    def follow(self, unit: nn.Module, owners: list[list[Owner]]) -> None:
        """Take the places that ``owners`` have below ``unit`` now, and forget those that are gone."""
        paths = {id(module): path for path, module in unit.named_modules()}
        self.summed, self.others, self.tables = (
            [(paths[id(module)], name) for module, name in one if id(module) in paths] for one in owners
        )


def _put(owners: dict[Place, dict[str, Any]], tensors: dict[Place, Any]) -> None:
    for place, owner in owners.items():
        owner[place[1]] = tensors[place]


def make_local(
    unit: nn.Module, places: dict[str, tuple[str, ...]], summed: set[str], tables: list[str], mesh: DeviceMesh
) -> None:
    """Make whole parameters local while ``unit`` runs.

    Args:
        places: module path below ``unit`` -> names of the module's own parameters.
        summed: those among the paths whose gradients are summed over the ranks of ``mesh``.
        tables: paths of the embeddings that are cut over the vocabulary.
    """
    around = UnitParameters(mesh)
    around.tables = [(path, "weight") for path in tables]
    for path, names in places.items():
        found = [(path, name) for name in names]
        if path in summed:
            around.summed += found
            unit.get_submodule(path).__dict__["_summed_parameters"] = SummedParameters(around.group, names)
        else:
            around.others += found
    wrap_forward(unit, around)
