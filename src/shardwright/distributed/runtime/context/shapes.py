"""Where the positions of a sequence are after a tensor was viewed, indexed, or its dims were exchanged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from shardwright.distributed.runtime.context import parts
from shardwright.distributed.runtime.context.base import ContextTensor
from shardwright.distributed.runtime.context.parts import Split

FULL = slice(None)


def viewed(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``view``, ``reshape``, ``flatten``, ``unflatten``, ``squeeze``, ``unsqueeze``, ``view_as``."""
    x, *others = args
    if not isinstance(x, ContextTensor) or any(isinstance(item, torch.dtype) for item in others):
        return NotImplemented
    like = [torch.empty(item.shape, device="meta") if isinstance(item, Tensor) else item for item in others]
    shape = func(torch.empty(x.shape, device="meta"), *like, **kwargs).shape
    split = _in_shape(x.dealt, x.shape, shape)
    if split is None:
        return NotImplemented
    local = [split.local if dim == split.dim else size for dim, size in enumerate(shape)]
    inside = x.inside
    return x.like(inside.reshape(local), split) if _keeps_last(x, shape) else NotImplemented


def _keeps_last(x: ContextTensor, shape: torch.Size) -> bool:
    """Whether the last dim, which may be sharded inside, is what it was."""
    return x.kind is None or (len(shape) > 0 and shape[-1] == x.shape[-1])


def _in_shape(split: Split, before: torch.Size, after: torch.Size) -> Split | None:
    """The split of a tensor whose shape was ``before`` and is ``after``; None where its positions are torn apart."""
    if after[: split.dim + 1] == before[: split.dim + 1]:
        return split
    items, behind = prod(before[: split.dim + 1]), 1
    for dim, size in enumerate(after):
        behind *= size
        if behind == items:
            if size % split.length if split.length else size:
                return None
            return replace(split, dim=dim, outer=size // split.length if split.length else 1)
    return None


def expanded(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, *sizes = args
    if kwargs or not isinstance(x, ContextTensor):
        return NotImplemented
    wanted = sizes[0].shape if isinstance(sizes[0], Tensor) else sizes[0] if len(sizes) == 1 else sizes
    wanted = [wanted] if isinstance(wanted, int) else list(wanted)
    dim = len(wanted) - x.ndim + x.dealt.dim
    if wanted[dim] not in (-1, x.dealt.total) or x.dealt.total == 1:
        return NotImplemented
    wanted[dim] = -1
    return x.like(x.inside.expand(wanted), x.dealt.at(dim))


def exchanged(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``transpose``, ``permute`` and ``t``."""
    x, *others = args
    if kwargs or not isinstance(x, ContextTensor) or x.kind is not None:
        return NotImplemented
    order = [size - 1 for size in func(_numbered(x.ndim), *others).shape]
    return x.like(func(x.inside, *others), x.dealt.at(order.index(x.dealt.dim)))


def _numbered(ndim: int) -> Tensor:
    """A tensor whose sizes say which dim is which: the first is one long, the second two."""
    return torch.empty([dim + 1 for dim in range(ndim)], device="meta")


def indexed(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x[index]`` with numbers, slices, ``None`` and ``...``."""
    x, index = args
    items = list(index) if isinstance(index, tuple) else [index]
    if not isinstance(x, ContextTensor) or not all(_is_basic(item) for item in items):
        return NotImplemented
    items = _written_out(items, x.ndim)
    place = _place_of(items, x.dealt.dim)
    item, dim = items[place], sum(not isinstance(item, int) for item in items[:place])
    if isinstance(item, int):
        return _position(x, items, place)
    start, end, step = item.indices(x.dealt.total)
    if (start, end, step) == (0, x.dealt.total, 1):
        split = x.dealt
    elif step == 1 and x.dealt.outer == 1 and end > start:
        split = x.dealt.narrowed(start, end)
        first = x.dealt.mine[0]
        mine = split.mine
        items[place] = slice(mine[0] + start - first, mine[1] + start - first) if mine[1] > mine[0] else slice(0, 0)
    else:
        return NotImplemented
    return x.like(x.inside[tuple(items)], split.at(dim))


def _is_basic(item: Any) -> bool:
    return item is None or item is Ellipsis or type(item) is int or (isinstance(item, slice) and _is_plain(item))


def _is_plain(item: slice) -> bool:
    return all(part is None or type(part) is int for part in (item.start, item.stop, item.step))


def _written_out(items: list[Any], ndim: int) -> list[Any]:
    """An index with an item for each of ``ndim`` dims, beside the ``None``s."""
    missing = ndim - sum(item is not None and item is not Ellipsis for item in items)
    at = next((n for n, item in enumerate(items) if item is Ellipsis), len(items))
    return [*items[:at], *[FULL] * missing, *items[at + 1 :]]


def _place_of(items: list[Any], dim: int) -> int:
    """The place of the item for ``dim``."""
    return [n for n, item in enumerate(items) if item is not None][dim]


def _position(x: ContextTensor, items: list[Any], place: int) -> Any:
    """What is at one position: sent by the rank that has it."""
    split = x.dealt
    if split.outer > 1 or x.kind is not None or not -split.length <= items[place] < split.length:
        return NotImplemented
    position, (start, end), inside = items[place] % split.length, split.mine, x.inside
    mine = start <= position < end
    if end > start:
        found = inside[(*items[:place], position - start if mine else 0, *items[place + 1 :])]
        found = torch.where(torch.tensor(mine, device=found.device), found, 0)
    else:  # this rank has no position at all
        found = inside.sum(split.dim, keepdim=True)[(*items[:place], 0, *items[place + 1 :])]
    return parts.summed(found, split)


def narrowed(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``narrow(dim, start, length)``."""
    if kwargs or not isinstance(args[0], ContextTensor):
        return NotImplemented
    x, dim, start, length = args
    items: Sequence[Any] = [*[FULL] * (dim % x.ndim), slice(start, start + length)]
    return indexed(func, (x, tuple(items)), {})
