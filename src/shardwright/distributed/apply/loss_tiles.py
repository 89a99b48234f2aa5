"""``model(labels=...)`` that computes logits and loss a tile of tokens at a time, so that logits are never whole."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shardwright._torch import without_torch_function
from shardwright.distributed.runtime.context.base import Meshes
from shardwright.distributed.runtime.context.blocks import ContextLayer
from shardwright.distributed.runtime.context.parts import Split
from shardwright.distributed.runtime.context.sharded import ContextSharded, context_sharded, recognized
from shardwright.distributed.runtime.forward import (
    Around,
    Forward,
    arounds,
    local_parameters,
    original_class,
    parameters_as,
    wrap_forward,
)
from shardwright.distributed.runtime.tiled_logits import Call, Product, TiledLogits
from shardwright.distributed.styles.linear import LogitsForward

_LOSS = "shardwright_loss"  # the argument by which a call is told of a loss that is not the model's own


def apply_loss_tiles(model: nn.Module, head: str, tiles: int) -> None:
    """Compute the loss of a call with labels, or by :func:`call_with_loss`, in ``tiles`` tiles, in place.

    Other calls are left as they are.

    ``logits`` in the output of such a call have shape and dtype, and raise UnsupportedError where they are used.

    Args:
        head: the name of the module that computes the logits.
    """
    losses = _LossInTiles(model, tiles)
    wrap_forward(model.get_submodule(head), _HeadInTiles(losses))
    wrap_forward(model, losses)


def call_with_loss(model: nn.Module, loss: Callable[[Any], Tensor], **inputs: Any) -> Tensor:
    """``loss(model(**inputs))``; in tiles, where ``model`` computes losses so.

    The loss is computed before the model's call ends, while FSDP2 has gathered what it needs.
    """
    if any(isinstance(around, _LossInTiles) for around in arounds(model)):
        return model(**inputs, **{_LOSS: loss})
    return loss(model(**inputs))


class _LossInTiles(Around):
    def __init__(self, model: nn.Module, tiles: int) -> None:
        self.names = list(inspect.signature(original_class(model).forward).parameters)[1:]
        self.tiles = tiles
        self.call: Call | None = None

    @torch.compiler.disable
    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        labels = {**dict(zip(self.names, args, strict=False)), **kwargs}.get("labels")
        kwargs = dict(kwargs)
        loss = kwargs.pop(_LOSS, None)
        if labels is None and loss is None:
            return forward(*args, **kwargs)
        outer, self.call = self.call, Call(self.tiles)
        try:
            output = forward(*args, **kwargs)
            return output if loss is None else loss(output)
        finally:
            self.call.is_open = False
            self.call = outer


class _HeadInTiles(Around):
    def __init__(self, losses: _LossInTiles) -> None:
        self.losses = losses

    @torch.compiler.disable
    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self.losses.call
        if call is None or len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            return forward(*args, **kwargs)
        hidden, split = _part(module, args[0])
        reader = next((around for around in arounds(module) if isinstance(around, LogitsForward)), None)
        if reader is not None:
            hidden = reader.read(hidden)

        def compute(tokens: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
            with parameters_as(module, dict(weights)):
                if reader is None:
                    return forward(tokens)
                with reader.has_read():
                    return forward(tokens)

        weights = local_parameters(module)
        with torch.no_grad():
            like = compute(hidden[..., :1, :], weights)  # of one token in each row: its dtype, and the vocabulary
        if split is not None:
            hidden = context_sharded(hidden, *split)
        shape = (*hidden.shape[:-1], like.shape[-1])
        return TiledLogits.make(
            Product(hidden, weights, compute), torch.empty(shape, dtype=like.dtype, device="meta"), call
        )


def _part(module: nn.Module, hidden: Tensor) -> tuple[Tensor, tuple[Split, Meshes] | None]:
    """What this rank has of the hidden states, and how they are dealt out; None where each rank has all of them."""
    layer = next((around for around in arounds(module) if isinstance(around, ContextLayer)), None)
    if layer is not None:
        hidden = recognized(hidden, layer.context.meshes)
    if not isinstance(hidden, ContextSharded):
        return hidden, None
    with without_torch_function():
        return hidden.inside, (hidden.dealt, hidden.meshes)
