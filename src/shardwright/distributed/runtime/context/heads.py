"""Attention of this rank's heads over all positions.

An all-to-all brings queries, keys and values of this rank's heads from all ranks, and another takes the results back to
the ranks of their positions (Jacobs et al. 2023, "DeepSpeed Ulysses"). Masks stay as they are, and the kernel sees a
sequence as one process has it. Keys and values of fewer heads than there are ranks are repeated until they divide.
"""

from __future__ import annotations

from collections.abc import Callable
from math import lcm
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.distributed.runtime import collectives as c
from shardwright.distributed.runtime.context.parts import Split, padded_to
from shardwright.distributed.runtime.forward import attributes_as

GROUPS = "num_key_value_groups"  # how often transformers' kernels repeat keys and values, an attribute of the module
HEADS = 1
Kernel = Callable[..., tuple[Tensor, Tensor | None]]


def attend_by_heads(
    kernel: Kernel,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    kwargs: dict[str, Any],
    split: Split,
) -> Tensor:
    """The result for this rank's positions ``[batch, positions, heads, size]``; all but the mask are of its part.

    Args:
        split: of the sequence, the tensors' third dim.
    """
    heads, shared = query.shape[HEADS], lcm(key.shape[HEADS], split.group.size)
    repeats = shared // key.shape[HEADS]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, HEADS), value.repeat_interleave(repeats, HEADS)
    query, key, value = _of_my_heads((query, key, value), split)
    mine = split.group.rank
    out = attend_some_heads(kernel, module, query, key, value, mask, kwargs, heads, mine)
    return _ToRows.apply(out.transpose(1, 2), split).transpose(1, 2)


def attend_some_heads(
    kernel: Kernel,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    kwargs: dict[str, Any],
    heads: int,
    chunk: int,
) -> Tensor:
    """The kernel on chunk number ``chunk`` of ``heads`` heads, over all positions. The replay uses it, too.

    Args:
        query: of the heads in the chunk; ``key`` and ``value``, of theirs.
    """

    def of_chunk(x: Any) -> Any:
        """Of what has an entry for every head (a mask, a bias of positions), those of the chunk; all else as it is."""
        if isinstance(x, Tensor) and x.ndim == 4 and x.shape[HEADS] == heads > 1:
            return x.narrow(HEADS, chunk * query.shape[HEADS], query.shape[HEADS])
        return x

    local = {GROUPS: query.shape[HEADS] // key.shape[HEADS]} if GROUPS in module.__dict__ else {}
    with attributes_as(module, local):
        out, _ = kernel(
            module, query, key, value, of_chunk(mask), **{name: of_chunk(item) for name, item in kwargs.items()}
        )
    return out


def _of_my_heads(tensors: tuple[Tensor, ...], split: Split) -> tuple[Tensor, ...]:
    """All positions of this rank's heads, in one collective where the heads are of one size."""
    if len({x.shape[-1] for x in tensors}) > 1:
        return tuple(_ToHeads.apply(x, split) for x in tensors)
    ranks = split.group.size
    by_rank = [x.unflatten(HEADS, (ranks, -1)) for x in tensors]
    mine = _ToHeads.apply(torch.cat(by_rank, HEADS + 1).flatten(HEADS, HEADS + 1), split)
    return mine.split([x.shape[HEADS + 1] for x in by_rank], HEADS)


def to_heads(x: Tensor, split: Split) -> Tensor:
    """``[batch, heads, positions of this rank, size]`` to ``[batch, heads of this rank, positions, size]``."""
    ranks, dim = split.group.size, split.dim
    sent = padded_to(x, dim, split.widest).unflatten(HEADS, (ranks, -1)).movedim(HEADS, 0)
    came = c.all_to_all(sent, [1] * ranks, [1] * ranks, split.group)
    pieces = [part.narrow(dim, 0, end - start) for part, (start, end) in zip(came, split.bounds, strict=True)]
    return torch.cat(pieces, dim)


def to_rows(x: Tensor, split: Split) -> Tensor:
    """``[batch, heads of this rank, positions, size]`` to ``[batch, heads, positions of this rank, size]``."""
    ranks, dim = split.group.size, split.dim
    sent = torch.stack([padded_to(x.narrow(dim, a, b - a), dim, split.widest) for a, b in split.bounds])
    came = c.all_to_all(sent, [1] * ranks, [1] * ranks, split.group)
    start, end = split.mine
    return came.narrow(dim + 1, 0, end - start).movedim(0, HEADS).flatten(HEADS, HEADS + 1)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split: Split) -> Tensor:
        ctx.split = split
        return to_heads(x, split)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        c.refuse_twice()
        return _ToRows.apply(grad, ctx.split), None


class _ToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split: Split) -> Tensor:
        ctx.split = split
        return to_rows(x, split)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        c.refuse_twice()
        return _ToHeads.apply(grad, ctx.split), None
