"""FSDP2 units that a rank does not run: it takes part in their collectives all the same.

Data-parallel ranks may run different units: LayerDrop draws other layers on each, a batch without images leaves the
vision tower out. FSDP2 gathers and reduces a unit when it runs, and its
collectives pair up in order: ranks that run different units would compute with halves of two layers, or wait for ever.

Here every rank goes through all units in one order. Before a unit runs, and when the module around it ends, the units
in front of it that did not run are *passed*: gathered, given zero gradients in backward, and reduced, in the places
where the ranks that run them do so. So gradients are the averages that one process has. A unit that no rank has run
has gradients of zero everywhere; its parameters get None back, as in one process, so that optimizers leave them alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardwright import _torch
from shardwright.distributed.runtime.forward import Around, Forward, wrap_forward


def pass_skipped_units(model: nn.Module, order: Sequence[str], without: str) -> None:
    """Let ranks run different units of ``model``, the root of FSDP2's units, in place.

    Args:
        order: the names of lists of blocks in the order in which they run; others keep the order of the model.
        without: an argument of the model's forward; calls that have it are left as they are.
    """
    units = _tree(model, order)
    for unit in units:
        if unit.parts:
            wrap_forward(unit.module, _Passing(unit, without if unit.module is model else ""))
        for part in unit.parts:
            part.module.register_forward_pre_hook(_Arrival(unit, part), prepend=True, with_kwargs=True)


class _Unit:
    """A unit, the units inside it in the order in which they run, and those that are left in the forward that runs."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.parts: list[_Unit] = []
        self.left: list[_Unit] | None = None  # None: no forward runs

    def arrives(self, part: _Unit) -> list[_Unit]:
        """The units to pass before ``part`` runs."""
        if self.left is None or part not in self.left:
            return []  # it runs again
        place = self.left.index(part)
        passed, self.left = self.left[:place], self.left[place + 1 :]
        return passed

    def take_part(self, token: Tensor) -> Tensor:
        """Do what FSDP2 does around a forward and a backward of this unit; ``token`` is 0 and stays 0."""
        state: Any = _torch.state_of(self.module)
        token = _torch.begin_forward(state, self.module, token)
        for part in self.parts:
            token = part.take_part(token)
        return _torch.end_forward(state, self.module, token.clone())


class _Arrival:
    """Before a unit runs, those in front of it that did not run are passed."""

    def __init__(self, around: _Unit, unit: _Unit) -> None:
        self.around, self.unit = around, unit

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _torch.in_backward():
            return None  # a checkpoint repeats it
        passed = self.around.arrives(self.unit)
        return _passed(passed, (args, kwargs)) if passed else None


class _Passing(Around):
    """When a module ends, the units inside that did not run are passed."""

    eager = True

    def __init__(self, unit: _Unit, without: str) -> None:
        self.unit, self.without = unit, without

    @torch.compiler.disable
    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        unit = self.unit
        if unit.left is not None or _torch.in_backward() or (self.without and self.without in kwargs):
            return forward(*args, **kwargs)
        unit.left = list(unit.parts)
        try:
            output = forward(*args, **kwargs)
            return _passed(unit.left, output) if unit.left else output
        finally:
            unit.left = None


def _passed(units: list[_Unit], values: Any) -> Any:
    """``values``, which have come through ``units`` now as far as backward is concerned."""
    leaves, spec = _torch.tree_flatten(values)
    floats = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    places = [n for n in floats if leaves[n].requires_grad] or floats[:1]
    trained = torch.is_grad_enabled() and bool(places)
    token = torch.zeros((), device=next(units[0].module.parameters()).device)
    for place in places if trained else ():
        leaf = leaves[place].to_local() if isinstance(leaves[place], DTensor) else leaves[place]
        token = token + leaf.flatten()[:0].sum()
    if trained and not token.requires_grad:
        token.requires_grad_()  # FSDP2 reduces in order only where an input has a gradient
    for unit in units:
        token = unit.take_part(token)
    for place in places if trained else ():
        leaves[place] = leaves[place] + token.to(leaves[place].dtype)
    return _torch.tree_unflatten(leaves, spec)


def _tree(model: nn.Module, order: Sequence[str]) -> list[_Unit]:
    """The units, each before those inside it."""
    units = {"": _Unit(model)}
    for name, module in model.named_modules():
        if module is model or not _torch.is_unit(module):
            continue
        units[name] = _Unit(module)
        around = max(
            (other for other in units if other != name and (not other or name.startswith(f"{other}."))), key=len
        )
        units[around].parts.append(units[name])
    for unit in units.values():
        unit.parts = _as_they_run(unit.parts, {id(each): name for name, each in units.items()}, order)
    return list(units.values())


def _as_they_run(parts: list[_Unit], names: dict[int, str], order: Sequence[str]) -> list[_Unit]:
    """``parts`` with those of the lists in ``order`` brought into that order, in the places of all of them."""
    lists = [
        next((n for n, each in enumerate(order) if names[id(part)].startswith(f"{each}.")), None) for part in parts
    ]
    known = [n for n, each in enumerate(lists) if each is not None]
    by_order = sorted(known, key=lambda n: (lists[n], n))
    result = list(parts)
    for place, source in zip(known, by_order, strict=True):
        result[place] = parts[source]
    return result
