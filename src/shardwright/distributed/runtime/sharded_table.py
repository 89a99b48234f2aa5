"""Embeddings that are cut over the vocabulary, for code that reads their weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from shardwright.distributed.runtime import collectives as c
from shardwright.distributed.runtime.implicit import ImplicitDTensor, mark
from shardwright.distributed.runtime.layout import sharded


class ShardedTable(ImplicitDTensor):
    """The weight of an embedding that is cut over the vocabulary, for code that reads it without calling the embedding.

    One row (a padding vector) is sent by the rank that has it; for anything else the whole table is used.
    """

    __slots__ = ()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[0], ShardedTable):
            row, *others = args[1] if isinstance(args[1], tuple) else (args[1],)
            if type(row) is int:
                return _row(args[0], row)[tuple(others)]
        return super().__torch_function__(func, types, args, kwargs)


def sharded_table(weight: DTensor) -> ShardedTable:
    """``weight``, cut over its rows, in the same autograd graph."""
    return mark(sharded(weight.to_local(), 0, weight.shape[0], weight.device_mesh), ShardedTable)


def _row(table: ShardedTable, row: int) -> Tensor:
    group, rows, local = c.Group.of(table.device_mesh), table.shape[0], table.to_local()
    if not -rows <= row < rows:
        raise IndexError(f"Row {row} of a table of {rows}.")
    start, end = group.bounds(rows)
    here = row % rows - start
    mine = torch.tensor(0 <= here < end - start, device=local.device)
    return c.reduce_from_region(torch.where(mine, local[here if mine else 0], 0), group)
