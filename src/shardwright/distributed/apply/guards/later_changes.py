"""Parameters that appear on a model that is sharded already: refused when the model runs next, before it does.

An adapter, a new head or larger embeddings are sized by this rank's part of the layer they are put around, are on no
mesh, and no rank shares their gradient: ranks would train models of their own. Everything that changes a model comes
before ``parallelize``.
"""

from __future__ import annotations

from operator import is_
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shardwright import _torch
from shardwright.distributed.runtime.forward import Around, Forward, arounds, wrap_forward, wrap_method
from shardwright.errors import PlanError

_ORDER = (
    "Change the model first and parallelize it last: model = get_peft_model(model, ...) (or "
    "model.resize_token_embeddings(...), or the new head), then model = parallelize(model, config), then the optimizer."
)


def refuse_later_changes(model: nn.Module) -> None:
    """Make ``model``, whose parameters are about to become DTensors, raise PlanError where one is added later.

    In place. Every rank finds it by itself, when the model runs next, before the first collective.
    """
    wrap_forward(model, _Known())
    for module in model.modules():
        wrap_method(module, "resize_token_embeddings", _SameSize())


def look_for_changes(model: nn.Module) -> None:
    """Look now: for FSDP2, which gathers the root's parameters before the model's forward is called."""
    next(each for each in arounds(model) if isinstance(each, _Known)).look(model)


class _Known(Around):
    """Compares the model's parameters and modules with those that it had when they were last looked at."""

    def __init__(self) -> None:
        self._seen: list[tuple[nn.Module, list[Any], list[Any]]] = []
        self._groups: list[Any] = []
        self._running = False

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._running:
            return forward(*args, **kwargs)
        self.look(module)  # what is wrapped around a model may call its forward without its hooks
        self._running = True
        try:
            return forward(*args, **kwargs)
        finally:
            self._running = False

    @torch.compiler.disable
    def look(self, model: nn.Module) -> None:
        if _torch.runs(model) or any(getattr(group, "is_held", False) for group in self._groups):
            return  # gathered parameters are in place of the shards
        if not self._seen or not all(
            _same(params, module._parameters) and _same(parts, module._modules) for module, params, parts in self._seen
        ):
            self._groups = [group for state in _torch.states_of(model) for group in _torch.groups_of(state)]
            self._check(model)
            self._seen = [
                (part, list(part._parameters.values()), list(part._modules.values())) for part in model.modules()
            ]

    def _check(self, model: nn.Module) -> None:
        shards = {id(shard) for group in self._groups for shard in _torch.shards_of(group)}
        for name, param in model.named_parameters():
            if not isinstance(param, DTensor):
                raise PlanError(
                    f"{name} {tuple(param.shape)} was put on a model that is sharded already. It is on no mesh, and "
                    f"the layers around it are this rank's part: every rank would train a model of its own. {_ORDER}"
                )
            if shards and id(param) not in shards:
                raise PlanError(
                    f"{name} {tuple(param.shape)} took the place of a parameter of a model that is sharded already, "
                    "and FSDP2 does not know of it. Write into the parameter that was there instead (param.copy_ under "
                    f"torch.no_grad()). {_ORDER}"
                )


def _same(before: list[Any], now: dict[str, Any]) -> bool:
    return len(before) == len(now) and all(map(is_, before, now.values()))


class _SameSize(Around):
    def __call__(self, module: Any, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        asked = kwargs.get("new_num_tokens", args[0] if args else None)
        size = module.get_input_embeddings().weight.shape[0]
        if asked in (None, size):
            return forward(*args, **kwargs)
        raise PlanError(f"The embedding of {size} tokens is sharded already and cannot be resized to {asked}. {_ORDER}")
