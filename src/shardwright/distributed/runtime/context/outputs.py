"""The entry and the exit of a context-parallel model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shardwright.distributed.runtime.context import parts
from shardwright.distributed.runtime.context.base import Context
from shardwright.distributed.runtime.context.places import (
    RESULT,
    Change,
    Places,
    argument_names,
    mapped,
    mapped_arguments,
)
from shardwright.distributed.runtime.context.sharded import (
    ContextSharded,
    context_sharded,
    handed_out,
    made_whole,
    recognized,
    taken_in,
)
from shardwright.distributed.runtime.forward import Around, Forward
from shardwright.distributed.runtime.tiled_logits import TiledLogits, handed_out_tiled

LOGITS = ("logits",)
HIDDEN = ("last_hidden_state",)
CACHE = "past_key_values"


class ContextModel(Around):
    """Takes whole batches; hands out what is in ``kept`` split along the sequence, and everything else whole.

    Around the parallelized model, and around the models inside of it that have split blocks: code may call these, too
    (for hidden states). Called by another of them, one makes known the true length of what it hands out, and that is
    all.

    Logits come whole, too, where no gradients are recorded and the model has not computed its loss from them
    (generation, scoring). A call with a key-value cache is computed on whole sequences, alike on every rank. A training
    step that is told nothing of a cache is split, and hands out none. It fills none, but for a call with positions and
    no mask: transformers looks for packed documents in these where there is no cache, and would not have looked.

    Args:
        caches: whether the model fills a cache when it is not told to.
    """

    def __init__(self, module: nn.Module, context: Context, *, caches: bool, kept: tuple[str, ...] = LOGITS) -> None:
        self.context, self.caches, self.kept = context, caches, kept
        self.names = argument_names(module)

    @torch.compiler.disable
    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.context.in_call:
            with self.context.noting():
                return changed(forward(*args, **kwargs), self._known)
        named = {**dict(zip(self.names, args, strict=False)), **kwargs}
        cached = named.get(CACHE) is not None or self._makes_cache(module, named)
        packed = named.get("position_ids") is not None and named.get("attention_mask") is None
        if not cached and not packed and "use_cache" in self.names[len(args) :]:
            kwargs = {**kwargs, "use_cache": False}
        args, kwargs = mapped_arguments(self.names, args, kwargs, lambda path, x: self._entering(x))
        with self.context.called(active=not cached), self.context.noting():
            result = changed(forward(*args, **kwargs), self._known)
        if not cached and isinstance(result, dict) and result.get(CACHE) is not None:
            result[CACHE] = None  # it has this rank's parts
        return self._leaving(result, keep=torch.is_grad_enabled() or named.get("labels") is not None)

    def _entering(self, x: Tensor) -> Tensor:
        """A split batch: its ids, labels and masks are made whole, since code reads them in any way; the rest stays."""
        x = recognized(x, self.context.meshes)
        if not isinstance(x, ContextSharded):
            return parts.entering(x, self.context.meshes.group)
        return taken_in(x, self.context.meshes) if x.is_floating_point() else made_whole(x)

    def _makes_cache(self, module: nn.Module, named: dict[str, Any]) -> bool:
        """Whether a cache is wanted. The one that a training step fills where it is told nothing is not."""
        told = named.get("use_cache")
        if told is None and module.training and torch.is_grad_enabled():
            return self.caches and named.get("return_dict") is False  # a tuple, in which it could not be found
        return bool(self.caches if told is None else told)

    def _known(self, path: str, x: Tensor) -> Tensor:
        split = None if isinstance(x, ContextSharded) else self.context.noted(x)
        return x if split is None else context_sharded(x, split, self.context.meshes)

    def _leaving(self, result: Any, *, keep: bool) -> Any:
        return changed(result, lambda path, x: _handed_out(x, keep=keep and path in self.kept))


class Recorded(Around):
    """A module in a split block whose results hooks of the model note: it is remembered that they are parts."""

    def __init__(self, context: Context, places: Places) -> None:
        self.context, self.results = context, dict(places.results)

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result, context = forward(*args, **kwargs), self.context

        def note(path: str, x: Tensor) -> Tensor:
            place = self.results.get(path)
            if place is not None and context.split is not None and not isinstance(x, ContextSharded):
                context.note(x, place.split(context.split, context.batch))
            return x

        return mapped(result, RESULT, note)


def changed(result: Any, change: Change) -> Any:
    """What a model returns, with every tensor changed; an output of transformers stays the same object."""
    if not isinstance(result, dict):
        return mapped(result, "", change)
    for key, item in result.items():
        new = mapped(item, key, change)
        if new is not item:
            result[key] = new
    return result


def _handed_out(x: Tensor, *, keep: bool) -> Tensor:
    if keep and isinstance(x, TiledLogits):
        return handed_out_tiled(x)
    return handed_out(x) if keep and isinstance(x, ContextSharded) else made_whole(x)
