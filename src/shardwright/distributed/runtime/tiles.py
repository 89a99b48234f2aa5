"""A function of rows (tokens) computed a tile of rows at a time, so that what it makes is never in memory whole.

Every tile is a checkpoint: backward computes it again, one tile after the other. Gradients of weights that all tiles
use are added up in one buffer, in float32 where the weights are in half precision, so that tiles round no more than one
product would. The number of tiles is given, not their size: ranks that work on the same rows make the same number of
collectives. (Tiled computation for long sequences: Bekman et al. 2025, "Arctic Long Sequence Training".)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from shardwright.distributed.runtime.dtypes import at_least_float32
from shardwright.distributed.runtime.vocabulary import refuse_second_derivative

Tile = Callable[[Sequence[Tensor], Mapping[str, Tensor]], Tensor]


def in_tiles(
    function: Tile, rows: Sequence[Tensor], weights: Mapping[str, Tensor], tiles: int, *, dim: int = 0
) -> list[Tensor]:
    """``function(tile of every tensor in rows, weights)`` for each tile, in the order of the rows.

    Args:
        rows: tensors that are cut alike along ``dim``.
        weights: by name, tensors that every tile uses whole. ``function`` must use these, and no other trained tensor
            that is large, since only for these gradients are added up in place.
        tiles: into how many tiles; fewer where there are fewer rows.
    """
    tiles = max(min(tiles, rows[0].shape[dim]), 1)
    pieces = zip(*(x.tensor_split(tiles, dim) for x in rows), strict=True)
    if not torch.is_grad_enabled():
        return [function(_contiguous(piece), weights) for piece in pieces]
    shared = {name: _Shared(weight) for name, weight in weights.items()}

    def tile(*piece: Tensor) -> Tensor:
        return function(_contiguous(piece), {name: weight.use() for name, weight in shared.items()})

    return [checkpoint(tile, *piece, use_reentrant=False) for piece in pieces]


def _contiguous(piece: Sequence[Tensor]) -> list[Tensor]:
    """In one piece of memory, as the whole is: code that takes a view of it relies on that."""
    return [x.contiguous() for x in piece]


class _Shared:
    """A weight whose gradients, one for each tile, are added up as they come."""

    def __init__(self, weight: Tensor) -> None:
        self.sum: Tensor | None = None
        self.weight = _Total.apply(weight, self) if weight.requires_grad else weight

    def use(self) -> Tensor:
        return _Use.apply(self.weight, self) if self.weight.requires_grad else self.weight

    def add(self, grad: Tensor) -> None:
        if self.sum is None:
            self.sum = torch.zeros_like(grad, dtype=at_least_float32(grad.dtype))
        self.sum += grad

    def take(self) -> Tensor | None:
        total, self.sum = self.sum, None
        return total


class _Use(torch.autograd.Function):
    """The weight for one tile. Its gradient is added up at once, and none is handed on."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, shared: _Shared) -> Tensor:
        ctx.shared = shared
        ctx.set_materialize_grads(False)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, None]:
        refuse_second_derivative()
        if grad is not None:
            ctx.shared.add(grad)
        return None, None


class _Total(torch.autograd.Function):
    """The weight behind all tiles. Its backward runs when those of all uses have run, and hands on the sum."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, shared: _Shared) -> Tensor:
        ctx.shared, ctx.dtype = shared, weight.dtype
        ctx.set_materialize_grads(False)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        total = ctx.shared.take()
        return None if total is None else total.to(ctx.dtype), None
