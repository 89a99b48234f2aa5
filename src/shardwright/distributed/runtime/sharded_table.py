"""Weights of embeddings and heads that are cut over the vocabulary, for code that reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement

from shardwright.distributed.runtime import collectives as c
from shardwright.distributed.runtime.implicit import ImplicitDTensor, OwnRules, joined, mark
from shardwright.distributed.runtime.layout import sharded
from shardwright.distributed.runtime.logits import sharded_logits
from shardwright.distributed.runtime.written import is_alias, read_only, refuse_lost_write


class ShardedTable(ImplicitDTensor, OwnRules):
    """A weight that is cut over the vocabulary, for code that reads it without calling its module.

    Its product with hidden states is logits that stay sharded. One row (a padding vector) is sent by the rank that has
    it. For anything else DTensor computes, or the whole table is used.
    """

    __slots__ = ()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        refuse_lost_write(func, args)
        own = _OWN.get(func)
        if own is not None:
            result = own(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        result = super().__torch_function__(func, types, args, kwargs)
        return read_only(result) if is_alias(func) and "_is_copy" in args[0].__dict__ else result


def table_of(local: Tensor, placement: Placement, shape: torch.Size, mesh: DeviceMesh) -> Tensor:
    """A weight of which this rank has ``local``, on the tensor-parallel ``mesh``: plain where each has all of it."""
    if not isinstance(placement, Shard):
        return local
    return mark(sharded(local, placement.dim, shape[placement.dim], mesh), ShardedTable)


def sharded_table(weight: DTensor) -> ShardedTable:
    """``weight``, cut over its rows, in the same autograd graph."""
    return mark(sharded(weight.to_local(), 0, weight.shape[0], weight.device_mesh), ShardedTable)


def _item(table: Tensor, index: Any) -> Any:
    row, *others = index if isinstance(index, tuple) else (index,)
    if isinstance(table, ShardedTable) and not table.placements[0].is_shard(0):
        return NotImplemented  # transposed: each rank has a part of the row
    return _row(table, row)[tuple(others)] if isinstance(table, ShardedTable) and type(row) is int else NotImplemented


def _row(table: ShardedTable, row: int) -> Tensor:
    group, rows, local = c.Group.of(table.device_mesh), table.shape[0], table.to_local()
    if not -rows <= row < rows:
        raise IndexError(f"Row {row} of a table of {rows}.")
    start, end = group.bounds(rows)
    here = row % rows - start
    mine = torch.tensor(0 <= here < end - start, device=local.device)
    return c.reduce_from_region(torch.where(mine, local[here if mine else 0], 0), group)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """``F.linear`` with a table ``[vocabulary, features]``."""
    if not isinstance(weight, ShardedTable) or not weight.placements[0].is_shard(0) or weight.ndim != 2:
        return NotImplemented
    own = None if bias is None else bias_of(bias, weight)
    return logits_of(F.linear(whole_input(input, weight), slice_of(weight), own), weight)


def _matmul(input: Tensor, other: Tensor) -> Any:
    """``input @ other`` with a table ``[features, vocabulary]``."""
    if not isinstance(other, ShardedTable) or not other.placements[0].is_shard(1) or other.ndim != 2:
        return NotImplemented
    local = torch.matmul(whole_input(input, other), slice_of(other))
    return sharded_logits(local, other.shape[1], other.device_mesh)


# The parts of a product with a table, for code that computes it a part at a time. A plain table is its own slice.


def whole_input(x: Tensor, table: Tensor) -> Tensor:
    """``x`` whole, for products with this rank's slice of ``table``: its gradients are summed over the ranks."""
    if not isinstance(table, ShardedTable):
        return joined(x)
    group = c.Group.of(table.device_mesh)
    if not isinstance(x, DTensor):
        return c.copy_to_region(x, group)
    if x.placements[0].is_shard(1):  # the residual stream under sequence parallelism
        return c.gather(x.to_local(), 1, x.shape[1], group, partial_grad=True)
    return c.copy_to_region(x.full_tensor(), group)


def by_rows(table: Tensor) -> Tensor:
    """``table``, plain where it is cut along its features."""
    return joined(table) if isinstance(table, ShardedTable) and not table.placements[0].is_shard(0) else table


def slice_of(table: Tensor) -> Tensor:
    """This rank's slice."""
    return table.to_local() if isinstance(table, ShardedTable) else table


def bias_of(bias: Tensor, table: Tensor) -> Tensor:
    """This rank's slice of the bias that belongs to ``table``."""
    if not isinstance(table, ShardedTable):
        return bias
    if isinstance(bias, DTensor):
        if bias.placements[0].is_shard(0):
            return bias.to_local()
        bias = bias.full_tensor()
    group = c.Group.of(table.device_mesh)
    start, end = group.bounds(table.shape[0])
    return c.copy_to_region(bias, group)[start:end]


def logits_of(product: Tensor, table: Tensor) -> Tensor:
    """The product with this rank's slice as logits of the whole vocabulary."""
    if not isinstance(table, ShardedTable):
        return product
    return sharded_logits(product, table.shape[0], table.device_mesh)


_OWN: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _item,
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.mm: _matmul,
    Tensor.mm: _matmul,
}
