"""MLPs that are computed a part of the sequence at a time, so that what they make inside is never in memory whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from shardwright.distributed.runtime.forward import (
    Around,
    Forward,
    all_local_parameters,
    all_parameters_as,
    arounds,
    wrap_forward,
)
from shardwright.distributed.runtime.regions import SEQUENCE_DIM, SequenceRegion
from shardwright.distributed.runtime.tiles import in_tiles

Weights = Mapping[str, Tensor]


def apply_mlp_tiles(model: nn.Module, names: Iterable[str], tiles: int) -> None:
    """Compute the named modules, which work on every position by itself, in ``tiles`` tiles, in place."""
    for name in names:
        wrap_forward(model.get_submodule(name), _Tiled(tiles))


class _Tiled(Around):
    """What is in it is compiled by itself: a checkpoint for each tile is not for a graph."""

    eager = True

    def __init__(self, tiles: int) -> None:
        self.tiles = tiles

    @torch.compiler.disable
    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            return forward(*args, **kwargs)
        (x,) = args
        region = next((around for around in arounds(module) if isinstance(around, SequenceRegion)), None)
        if region is not None and x.ndim == 2:
            return forward(x)  # tokens of all sequences in one dim: a part of them is no part of the region's sequence
        compute = partial(_compute, module, forward)
        if region is not None:
            return self._in_region(module, compute, x, region)
        return torch.cat(in_tiles(compute, [x], all_local_parameters(module), self.tiles, dim=x.ndim - 2), -2)

    def _in_region(self, module: nn.Module, compute: Any, x: Tensor, region: SequenceRegion) -> Tensor:
        """This rank's chunk of the sequence, in tiles that are equally long on every rank: chunks may be uneven."""
        length, own = region.length.value, x.shape[SEQUENCE_DIM]
        chunk = -(-length // region.group.size)

        def tile(pieces: Sequence[Tensor], weights: Weights) -> Tensor:
            region.length.value = pieces[0].shape[SEQUENCE_DIM] * region.group.size
            try:
                return compute(pieces, weights)
            finally:
                region.length.value = length

        x = pad(x, (0, 0, 0, chunk - own)) if own < chunk else x
        return torch.cat(
            in_tiles(tile, [x], all_local_parameters(module), self.tiles, dim=SEQUENCE_DIM), SEQUENCE_DIM
        ).narrow(SEQUENCE_DIM, 0, own)


def _compute(module: nn.Module, forward: Forward, pieces: Sequence[Tensor], weights: Weights) -> Tensor:
    with all_parameters_as(module, weights):
        return forward(*pieces)
