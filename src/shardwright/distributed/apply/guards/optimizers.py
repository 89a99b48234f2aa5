"""Optimizers made before the model was sharded: they would step on parameters that are no longer the model's.

Two looks, since neither sees everything. Before anything is changed, the optimizers of this process are asked for their
parameters. That finds every ``torch.optim.Optimizer`` that is alive, and refuses it where the mistake is. Afterwards,
whatever still holds a parameter that the model has lost (an optimizer that is no ``Optimizer``, a list for gradient
clipping) raises when it asks for its gradient, which none will ever have.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer

from shardwright.errors import PlanError

_ORDER = (
    "Make it after: model = parallelize(model, config), then optimizer = AdamW(model.parameters()), then the learning "
    "rate scheduler."
)


def check_no_optimizer(model: nn.Module, but: Optimizer | None = None) -> None:
    """Raise PlanError where an optimizer of this process holds parameters of ``model``.

    Args:
        but: one that may: it is given the sharded parameters.
    """
    names = {id(param): name for name, param in model.named_parameters()}
    if not any(_held(names, but)):
        return
    gc.collect()  # one that was deleted may wait in a cycle
    for optimizer, held in _held(names, but):
        raise PlanError(
            f"An optimizer ({type(optimizer).__name__}) was made before parallelize. It holds {len(held)} of the "
            f"model's parameters ({held[0]} is the first), which sharding replaces: it would train nothing. {_ORDER} "
            "If it is not needed any more, delete it first."
        )


def _held(names: dict[int, str], but: Optimizer | None) -> Iterator[tuple[Optimizer, list[str]]]:
    objects = gc.get_objects()  # of few types, but there may be a million of them
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, Optimizer)}
    for each in objects if kinds else ():
        if type(each) in kinds and each is not but:
            groups = vars(each).get("param_groups", ())
            held = [names[id(param)] for group in groups for param in group["params"] if id(param) in names]
            if held:
                yield each, held


class Replaced:
    """The parameters that a model has before it is sharded."""

    def __init__(self, model: nn.Module) -> None:
        # Weak references: nothing that sharding lets go of may stay in memory.
        self._before = {name: weakref.ref(param) for name, param in model.named_parameters()}

    def raise_for_gradients(self, model: nn.Module) -> None:
        """Make those that ``model`` has lost and somebody still holds raise PlanError when asked for a gradient."""
        now = {id(param) for param in model.parameters()}
        for name, reference in self._before.items():
            param = reference()
            if param is not None and id(param) not in now and type(param) is nn.Parameter:
                vars(param)["_lost_name"] = name
                param.__class__ = _Lost


class _Lost(nn.Parameter):
    """A parameter that was replaced by its shards."""

    _lost_name: str

    def _refuse(self, *_: Any) -> None:
        raise PlanError(
            f"{self._lost_name} is no longer a parameter of the model: parallelize has replaced it by this rank's part "
            "of it. Whatever holds it (an optimizer, a list of parameters for gradient clipping, averaged weights) was "
            f"made before. {_ORDER}"
        )

    grad = property(_refuse, _refuse)
