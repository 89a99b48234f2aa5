"""Adapters of a sharded model that are merged into its layers, or taken off.

PEFT's layers compute the merged weight from whole matrices. So ``merge`` and ``unmerge`` of a layer run on its whole
parameters, one layer at a time, and every rank keeps its part of what they leave: for every kind of adapter that is
what one process gets.

``merge_and_unload`` and ``unload`` put layers back in the place of what stood around them. What Shardwright does around
a layer, and around the model, is handed on to what takes the place.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from shardwright.distributed.apply.guards.fresh import mark_parallelized, parallelized_model
from shardwright.distributed.apply.parts import stand_for
from shardwright.distributed.runtime.adapted import BASE
from shardwright.distributed.runtime.expert_exchange import ExpertExchange
from shardwright.distributed.runtime.forward import Around, Forward, arounds, run_in, wrap_forward, wrap_method
from shardwright.distributed.runtime.gradient_sum import UnitParameters
from shardwright.distributed.runtime.layout import part_of, whole
from shardwright.errors import PlanError, UnsupportedError

_LAYER = ("merge", "unmerge")
_TAKES_OFF = ("merge_and_unload", "unload")
_DELETES = "delete_adapter"


def let_merge(model: nn.Module) -> None:
    """Make merging, unmerging and unloading of the adapters of ``model`` right, in place; every rank calls them.

    A forward with adapters that are merged and disabled unmerges them first, as PEFT's layers would in its middle.
    """
    if not any(BASE in module._modules for module in model.modules()):
        return
    together = _WholeLayer()
    for module in model.modules():
        if BASE in module._modules:
            for method in _LAYER:
                wrap_method(module, method, together)
        elif hasattr(type(module), _TAKES_OFF[0]):
            for method in _TAKES_OFF:
                wrap_method(module, method, _Unload(model))
            wrap_method(module, _DELETES, _Delete(model))
    wrap_forward(model, _UnmergedFirst(together))


def unmerge_disabled(model: nn.Module) -> None:
    """Do it now: for FSDP2, which gathers the root's parameters before the model's forward is called."""
    for each in arounds(model):
        if isinstance(each, _UnmergedFirst):
            each.look(model)


class _UnmergedFirst(Around):
    def __init__(self, layers: _WholeLayer) -> None:
        self.layers = layers

    @torch.compiler.disable
    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.look(module)
        return forward(*args, **kwargs)

    def look(self, model: nn.Module) -> None:
        """Unmerge the layers whose adapters are merged and disabled."""
        layer: Any
        for layer in model.modules() if self.layers.used else ():
            if BASE in layer._modules and layer.merged and layer.disable_adapters:
                layer.unmerge()


class _WholeLayer(Around):
    """Runs a method of a layer on its whole parameters, and keeps this rank's part of what it leaves."""

    def __init__(self) -> None:
        self.used = self.running = False

    @torch.no_grad()
    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.running:  # of a layer inside of a layer
            return forward(*args, **kwargs)
        self.used = True
        with self._whole(module):
            return forward(*args, **kwargs)

    @contextmanager
    def _whole(self, layer: nn.Module) -> Iterator[None]:
        places: list[tuple[dict[str, Any], str, Any]] = [
            (part._parameters, name, param)
            for part in layer.modules()
            for name, param in part._parameters.items()
            if param is not None
        ]
        for _, _, param in places:
            _check(layer, param)
        gathered = {id(param): nn.Parameter(whole(param.detach()).clone(), False) for _, _, param in places}
        self.running = True
        for owner, name, param in places:
            owner[name] = gathered[id(param)]
        try:
            yield
            left = [(param, owner[name]) for owner, name, param in places]
        finally:
            self.running = False
            for owner, name, param in places:
                owner[name] = param
        for param, new in left:
            if new is None or new.shape != param.shape or new.dtype != param.dtype:
                raise UnsupportedError(
                    f"The merged weight would be {'missing' if new is None else f'{new.dtype} {tuple(new.shape)}'} in "
                    f"place of {param.dtype} {tuple(param.shape)}, which a sharded parameter cannot become. Merge the "
                    "adapter on one process, and parallelize the merged model."
                )
        for param, new in left:
            param.to_local().copy_(part_of(new.detach(), param))


def _check(layer: nn.Module, param: Any) -> None:
    what = f"an adapted {type(layer).__name__}"
    if not isinstance(param, DTensor):
        raise PlanError(
            f"{what} cannot be merged or unmerged while the model runs, or after parameters were put on it: its "
            f"parameter of shape {tuple(param.shape)} is no shard. Call model.merge_adapter() between two forwards."
        )
    if not param.is_floating_point() or type(param.to_local()) is not torch.Tensor or "full_tensor" in vars(param):
        raise UnsupportedError(
            f"{what} has parameters that are quantized, or shards of Megatron-FSDP, and merging adapters into them is "
            "not supported. Save the adapter, model.save_pretrained(folder), and merge it on one process."
        )


class _TakesOff(Around):
    """Changes which modules a model has.

    Args:
        root: the model that was parallelized.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = weakref.ref(root)

    def root_of(self, module: nn.Module) -> nn.Module:
        root = self._root()
        if root is None or all(each is not module for each in root.modules()):
            raise PlanError("Adapters cannot be taken off a copy of a sharded model. Take them off the model itself.")
        return root


class _Unload(_TakesOff):
    """Takes all adapters off, and hands on what is around the layers and the model."""

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        root = self.root_of(module)
        before = dict(root.named_modules(remove_duplicate=False))
        for name, each in before.items():
            spread = any(isinstance(around, ExpertExchange) for around in arounds(each))
            if BASE in each._modules and (spread or isinstance(each, FSDPModule)):
                why = "has experts that are spread over ranks" if spread else "is an FSDP2 unit of its own"
                raise PlanError(
                    f"{name} {why}, so its adapters cannot be taken off. Merge them in place, model.merge_adapter(), "
                    "or take them off before parallelize."
                )
        with _units_follow(root), _ties_by_identity(module.get_submodule("model")):
            found = forward(*args, **kwargs)
        now = dict(root.named_modules(remove_duplicate=False))
        for name, old in before.items():
            if name in now and now[name] is not old:
                _hand_on(old, now[name])
        on = parallelized_model(root)
        if found is not root and on is not None:
            mark_parallelized(found, on)
            stand_for(root, found)
        return found


class _Delete(_TakesOff):
    """Takes one of several adapters off."""

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with _units_follow(self.root_of(module)):
            return forward(*args, **kwargs)


@contextmanager
def _units_follow(root: nn.Module) -> Iterator[None]:
    """Inside, modules may go or take the place of others; the units of ``root`` find their parameters afterwards."""
    units = [(unit, around) for unit in root.modules() for around in arounds(unit)]
    known = [(unit, around, around.owners(unit)) for unit, around in units if isinstance(around, UnitParameters)]
    yield
    for unit, around, owners in known:
        around.follow(unit, owners)


@contextmanager
def _ties_by_identity(model: Any) -> Iterator[None]:
    """PEFT compares the addresses of embedding and head, and shards have none; here it is the parameters themselves."""
    config = vars(model).get("config")
    if config is None or not vars(config).get("tie_word_embeddings"):
        yield
        return
    config.tie_word_embeddings = False
    yield
    tables = model.get_input_embeddings(), model.get_output_embeddings()
    config.tie_word_embeddings = None in tables or tables[0].weight is tables[1].weight


def _hand_on(old: nn.Module, new: nn.Module) -> None:
    """Let what was around ``old``, and between it and ``new`` inside of it, be around ``new``."""
    path = next((path for path, each in old.named_modules() if each is new), None)
    if path is None:
        return
    keys = path.split(".")
    for depth in reversed(range(len(keys))):
        if chain := arounds(old.get_submodule(".".join(keys[:depth]))):
            wrap_forward(new, _OfNobody(chain))


class _OfNobody(Around):
    """What was around a module that is gone and had no parameters of its own."""

    def __init__(self, chain: tuple[Around, ...]) -> None:
        self.chain = chain
        self.eager = any(each.eager for each in chain)
        self.module = nn.Module()

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return run_in(self.module, self.chain, forward, args, kwargs)
