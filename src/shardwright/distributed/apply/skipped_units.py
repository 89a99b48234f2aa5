"""FSDP2 units that a rank does not run, or runs for nothing: it takes part in their collectives all the same.

Data-parallel ranks may run different units: LayerDrop draws other layers on each, a batch without images leaves the
vision tower out. FSDP2 gathers a unit when it runs and reduces it when its inputs have their gradients, and its
collectives pair up in order: ranks that run different units would compute with halves of two layers, or wait for ever.

Here every rank goes through all units in one order. Before a unit runs, and when the module around it ends, the units
in front of it that did not run are *passed*: gathered, given zero gradients in backward, and reduced, in the places
where the ranks that run them do so. A unit that does run is *finished* in that place of backward, if FSDP2 has not done
so: its inputs have no gradients (a tower's first block), or its output is not used (a tower's last block, where an
earlier one's features are taken). So gradients are the averages that one process has. A parameter that no rank has used
gets None back, as in one process, so that optimizers leave it alone (:mod:`.passes`).

A rank that runs a unit again, or one that stands in front of the last, asks the others before
(:mod:`.guards.unit_order`). Where all do the same, the unit stands in the order at this place from then on, and may be
passed there, too.

Frozen units are not reduced. A rank that passes one gathers it in backward where a gradient goes through it on the
ranks that run it: where something that is trained stands in front of it, in the module that holds its list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from shardwright import _torch
from shardwright.distributed.apply.guards.unit_order import UnitOrder
from shardwright.distributed.planning.decided import DataPlan
from shardwright.distributed.runtime.forward import Around, Forward, wrap_forward

_LEARNED = 256  # calls that are taken into the order of the units inside of one module; others meet every time


def pass_skipped_units(model: nn.Module, shared: UnitOrder, plan: DataPlan, without: str) -> None:
    """Let ranks run different units of ``model``, the root of FSDP2's units, in place.

    Args:
        shared: for the data-parallel ranks.
        plan: the units, but for those that are gathered by what is around their modules, on all ranks alike.
        without: an argument of the model's forward; calls that have it are left as they are.
    """
    for unit in _tree(model, plan):
        if unit.parts:
            root = unit.module is model
            wrap_forward(unit.module, _Passing(unit, without if root else "", shared if root else None))
        for part in dict.fromkeys(unit.parts):
            part.module.register_forward_pre_hook(_Arrival(unit, part, shared), prepend=True, with_kwargs=True)


def let_drop(model: nn.Module) -> None:
    """Let the modules of ``model`` drop units, in place.

    Where FSDP2 says that ranks must run alike, some models of transformers run and use a layer that LayerDrop drops.
    """
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if module is not model and _torch.is_unit(module) and (holder := _holder(name, modules)) is not model:
            _torch.set_runs_in_step(holder, False)


class _Unit:
    """A unit and the units inside it.

    Attributes:
        holder: the module that holds the list that the unit is in.
        parts: the units inside, in the order in which they run; more than once where all ranks have run them again.
        left: the units inside that have not run in the forward that runs; None where none runs.
        token: where backward finishes those that have; it goes into what the next one gets.
    """

    def __init__(self, name: str, module: nn.Module, holder: nn.Module) -> None:
        self.name, self.module, self.holder = name, module, holder
        self.parts: list[_Unit] = []
        self.left: list[_Unit] | None = None
        self.token: Tensor | None = None

    def arrives(self, part: _Unit, shared: UnitOrder) -> list[_Unit]:
        """The units to pass before ``part`` runs.

        Raises:
            PlanError: it has run or was passed, and other ranks do not run it now.
        """
        assert self.left is not None
        if part not in self.left:
            shared.leaves(part.name)
            if len(self.parts) < _LEARNED:
                self.parts.insert(len(self.parts) - len(self.left), part)
            passed = []
        else:
            place = self.left.index(part)
            passed, self.left = self.left[:place], self.left[place + 1 :]
        shared.comes_to(part.name, sum(unit.size() for unit in passed))
        return passed

    def size(self) -> int:
        """The units that are passed with this one, itself among them."""
        return 1 + sum(part.size() for part in self.parts)

    def is_trained(self) -> bool:
        return any(param.requires_grad for param in self.module.parameters())

    def is_in_backward(self) -> bool:
        """Whether backward comes to this unit on the ranks that run it."""
        if self.is_trained():
            return True
        own = {id(param) for param in self.module.parameters()}
        before = takewhile(lambda param: id(param) not in own, self.holder.parameters())
        return any(param.requires_grad for param in before)

    def take_part(self, token: Tensor) -> Tensor:
        """Do what FSDP2 does around a forward and a backward of this unit; ``token`` is 0 and stays 0."""
        if token.requires_grad and not self.is_in_backward():
            with torch.no_grad():
                self.take_part(token.detach())
            return token
        state = _torch.state_of(self.module)
        token = _torch.begin_forward(state, self.module, token)
        for part in self.parts:
            token = part.take_part(token)
        return _torch.end_forward(state, self.module, token.clone())

    def finish(self) -> None:
        """Gather and reduce this unit in backward, as far as FSDP2 has not done so."""
        if not self.is_trained():
            return
        state = _torch.state_of(self.module)
        if not _torch.has_begun_backward(state):
            _torch.begin_backward(state)
            for part in reversed(self.parts):
                part.finish()
        _torch.end_backward(state)


class _Finish(torch.autograd.Function):
    """A node that backward comes to after all that ran later than it was made: autograd takes the newest first."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, unit: _Unit) -> Tensor:
        ctx.unit = unit
        return token.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.unit.finish()
        return grad, None


class _Through(torch.autograd.Function):
    """Values as they are, which have come through a token as far as backward is concerned."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return torch.zeros((), device=grads[0].device), *grads


class _Arrival:
    """Before a unit runs, those in front of it that did not run are passed."""

    def __init__(self, around: _Unit, unit: _Unit, shared: UnitOrder) -> None:
        self.around, self.unit, self.shared = around, unit, shared

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        around = self.around
        if around.left is None or _torch.in_backward():
            return None  # called outside of the forward around it; or a checkpoint repeats it
        token = _pass(around.token, around.arrives(self.unit, self.shared), module)
        if not self.unit.is_in_backward():
            around.token = token
            return None
        leaves, spec = _torch.tree_flatten((args, kwargs))
        places = _places(leaves)
        if token is not None and token.requires_grad and places:
            for place, value in zip(places, _Through.apply(token, *(leaves[place] for place in places)), strict=True):
                leaves[place] = value
        if torch.is_grad_enabled():
            around.token = _Finish.apply(_token(module) if token is None else token, self.unit)
        return _torch.tree_unflatten(leaves, spec)


class _Passing(Around):
    """When a module ends, the units inside that did not run are passed."""

    eager = True

    def __init__(self, unit: _Unit, without: str, of_root: UnitOrder | None) -> None:
        self.unit, self.without, self.of_root = unit, without, of_root

    @torch.compiler.disable
    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        unit = self.unit
        if unit.left is not None or _torch.in_backward() or (self.without and self.without in kwargs):
            return forward(*args, **kwargs)
        if self.of_root is not None:
            self.of_root.check()
        unit.left = list(unit.parts)
        try:
            output = forward(*args, **kwargs)
            if self.of_root is not None and not unit.left:
                return output  # what the last one made is what the model returns
            token = _pass(unit.token, unit.left, module)
            return output if token is None or not token.requires_grad else _with_token(output, token)
        finally:
            unit.left = unit.token = None
            if self.of_root is not None:
                self.of_root.ends()


def _token(module: nn.Module) -> Tensor:
    return torch.zeros((), device=next(module.parameters()).device, requires_grad=torch.is_grad_enabled())


def _pass(token: Tensor | None, units: list[_Unit], module: nn.Module) -> Tensor | None:
    """``token`` after it has come through ``units``."""
    for unit in units:
        token = unit.take_part(_token(module) if token is None else token)
    return token


def _places(leaves: list[Any]) -> list[int]:
    """Which of ``leaves`` have gradients; the first that could have one where none has."""
    floats = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return [n for n in floats if leaves[n].requires_grad] or floats[:1]


def _with_token(output: Any, token: Tensor) -> Any:
    """``output`` of a unit with ``token`` added: FSDP2 wants no views there."""
    leaves, spec = _torch.tree_flatten(output)
    for place in _places(leaves):
        leaves[place] = leaves[place] + token.to(leaves[place].dtype)
    return _torch.tree_unflatten(leaves, spec)


def _tree(model: nn.Module, plan: DataPlan) -> list[_Unit]:
    """The units, each before those inside it."""
    modules = dict(model.named_modules())
    others = {name for unit in plan.units if unit.gathered_around for name in unit.modules}
    units = {"": _Unit("", model, model)}
    for name, module in modules.items():
        if module is model or name in others or not _torch.is_unit(module):
            continue
        units[name] = _Unit(name, module, _holder(name, modules))
        around = max(
            (other for other in units if other != name and (not other or name.startswith(f"{other}."))), key=len
        )
        units[around].parts.append(units[name])
    for unit in units.values():
        unit.parts = _as_they_run(unit.parts, {id(each): name for name, each in units.items()}, plan.order)
    return list(units.values())


def _holder(name: str, modules: Mapping[str, nn.Module]) -> nn.Module:
    """The module that holds the list that the unit called ``name`` is in."""
    return modules[".".join(name.split(".")[:-2])]


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
