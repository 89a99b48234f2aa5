"""Key and value projections whose heads the tensor-parallel ranks do not divide."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardwright.distributed.runtime import collectives as c
from shardwright.distributed.runtime.forward import Around, Forward, local_parameters, parameters_as
from shardwright.distributed.styles.base import Style
from shardwright.distributed.styles.cuts import Cut, Picked
from shardwright.distributed.styles.linear import reader_input


class _KeyValueForward(Around):
    def __init__(self, style: KeyValueHeads, mesh: DeviceMesh) -> None:
        self.group = c.Group.of(mesh)
        self.count = style.count
        self.heads = style.heads
        self.shared = style.shared
        self.length = style.length
        self.inside = style.inside

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, *others = args
        if not self.inside:
            x = reader_input(x, self.group, self.shared, self.length)
        mine = {name: self._rows(param) for name, param in local_parameters(module).items()}
        with parameters_as(module, mine):
            return forward(x, *others, **kwargs)

    def _rows(self, param: Tensor) -> Tensor:
        """The rows of this rank's heads, of a weight ``[heads * features, in]`` or a bias ``[heads * features]``."""
        heads = torch.tensor(self.heads[self.group.rank], device=param.device)
        return param.unflatten(0, (self.count, -1)).index_select(0, heads).flatten(0, 1)


class KeyValueHeads(Style):
    """Whole, and every rank computes the heads its query heads attend with; the gradient is summed over the ranks.

    Args:
        count: heads in the weight.
        heads: rank -> the heads it computes, in order; one may be listed several times.
    """

    name = "kv_heads"
    reads = True
    output_is_slice = True
    rank_local = True
    for_adapted = True
    partial_gradients = True

    def __init__(self, *, count: int, heads: tuple[tuple[int, ...], ...]) -> None:
        self.count = count
        self.heads = heads

    def cut_out(self, width: int) -> Cut | None:
        each = width // self.count
        return Picked(features=tuple(tuple(h * each + i for h in mine for i in range(each)) for mine in self.heads))

    def around(self, module: nn.Module, mesh: DeviceMesh) -> Around:
        return _KeyValueForward(self, mesh)
