"""MLPs that are computed a part of the sequence at a time, so that what they make inside is never in memory whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from shardwright.distributed.runtime.forward import (
    Around,
    Forward,
    arounds,
    local_parameters,
    parameters_as,
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
        return torch.cat(in_tiles(compute, [x], _weights(module), self.tiles, dim=x.ndim - 2), -2)

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
        return torch.cat(in_tiles(tile, [x], _weights(module), self.tiles, dim=SEQUENCE_DIM), SEQUENCE_DIM).narrow(
            SEQUENCE_DIM, 0, own
        )


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """All parameters of ``module`` as this rank's local tensors, by name."""
    return {
        f"{name}.{key}" if name else key: tensor
        for name, part in module.named_modules()
        for key, tensor in local_parameters(part).items()
    }


def _compute(module: nn.Module, forward: Forward, pieces: Sequence[Tensor], weights: Weights) -> Tensor:
    own: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        owner, _, key = name.rpartition(".")
        own.setdefault(owner, {})[key] = tensor
    with ExitStack() as stack:
        for owner, tensors in own.items():
            stack.enter_context(parameters_as(module.get_submodule(owner), tensors))
        return forward(*pieces)
