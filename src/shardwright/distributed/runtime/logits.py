"""Logits that stay sharded on the vocabulary, and losses computed on the shards.

A column-parallel head returns :class:`ShardedLogits`, a DTensor that standard loss code can use as it is:
``F.cross_entropy``, ``log_softmax``, ``softmax``, ``logsumexp``, ``nll_loss``, ``kl_div`` and ``gather`` run on the
shards, without ever making a full-vocabulary tensor, and their backward needs no context manager. Anything else is done
by DTensor, which gathers where it must; results that no longer depend on the vocabulary come back as plain tensors,
equal on every rank. Dtypes are those that torch gives on one device, under autocast too (:mod:`.dtypes`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shardwright.distributed.runtime import collectives as c
from shardwright.distributed.runtime import vocabulary
from shardwright.distributed.runtime.dtypes import result_dtype
from shardwright.distributed.runtime.implicit import ImplicitDTensor, joined, mark
from shardwright.distributed.runtime.layout import sharded


class ShardedLogits(ImplicitDTensor):
    """A DTensor sharded on its last dim, the vocabulary."""

    __slots__ = ()

    @classmethod
    def keeps(cls, x: DTensor) -> bool:
        return len(x.placements) == 1 and x.placements[0].is_shard(x.ndim - 1)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        on_shards = _ON_SHARDS.get(func)
        if on_shards is not None:
            result = on_shards(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return super().__torch_function__(func, types, args, kwargs)


def sharded_logits(local: Tensor, vocabulary: int, mesh: DeviceMesh) -> ShardedLogits:
    """This rank's slice ``[..., vocabulary / tp]`` as logits of the whole vocabulary."""
    return mark(sharded(local, -1, vocabulary, mesh), ShardedLogits)


def _local(x: ShardedLogits) -> tuple[Tensor, c.Group]:
    """This rank's slice, and the ranks."""
    return x.to_local(), c.Group.of(x.device_mesh)


def _like(x: ShardedLogits, local: Tensor) -> ShardedLogits:
    return sharded_logits(local, x.shape[-1], x.device_mesh)


def _is_last(x: Tensor, dim: Any) -> bool:
    return dim in (-1, x.ndim - 1, (-1,), (x.ndim - 1,), [-1], [x.ndim - 1])


# Losses


def _targets(x: ShardedLogits, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The targets in one dim, and which of them count; IndexError where one is outside of the vocabulary."""
    tokens = joined(target).reshape(-1)
    kept = tokens != ignore_index
    outside = kept & ((tokens < 0) | (tokens >= x.shape[-1]))
    if not torch.compiler.is_compiling() and bool(outside.any()):
        raise IndexError(f"A target is outside the vocabulary of {x.shape[-1]}: {int(tokens[outside][0])}.")
    return tokens, kept


def _reduced(
    losses: Tensor, tokens: Tensor, kept: Tensor, weight: Tensor | None, reduction: str, shape: torch.Size
) -> Tensor:
    """The losses of the targets that count, weighted by class, put together as torch puts them together."""
    weights = kept.to(losses.dtype)
    if weight is not None:
        weights = weights * weight[tokens.where(kept, 0)].to(losses.dtype)
    losses = torch.where(kept, losses * weights, 0)
    if reduction == "none":
        return losses.view(shape)
    return losses.sum() / weights.sum() if reduction == "mean" else losses.sum()


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    if not isinstance(input, ShardedLogits) or input.ndim > 2 or target.is_floating_point():
        return NotImplemented
    if size_average is not None or reduce is not None or (weight is not None and label_smoothing):
        return NotImplemented
    tokens, kept = _targets(input, target, ignore_index)
    logits, group = _local(input)
    dtype = result_dtype(_small_cross_entropy, logits)
    rows = logits.reshape(-1, logits.shape[-1])
    losses = vocabulary.token_losses(rows, tokens, group, input.shape[-1], label_smoothing, dtype)
    return _reduced(losses, tokens, kept, weight, reduction, target.shape).to(dtype)


def _nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Any:
    if not isinstance(input, ShardedLogits) or input.ndim > 2 or size_average is not None or reduce is not None:
        return NotImplemented
    tokens, kept = _targets(input, target, ignore_index)
    log_probabilities, group = _local(input)
    dtype = result_dtype(_small_nll_loss, log_probabilities)
    rows = log_probabilities.reshape(-1, log_probabilities.shape[-1])
    picked = vocabulary.picked(rows, tokens.where(kept, 0).unsqueeze(-1), group, input.shape[-1]).squeeze(-1)
    losses = -picked.to(torch.promote_types(dtype, torch.float32))
    return _reduced(losses, tokens, kept, weight, reduction, target.shape).to(dtype)


def _kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Any:
    if not isinstance(input, ShardedLogits) or input.shape != target.shape or size_average is not None:
        return NotImplemented
    if reduce is not None or (target.requires_grad and not isinstance(target, ShardedLogits)):
        return NotImplemented
    log_probabilities, group = _local(input)
    start, end = group.bounds(input.shape[-1])
    other = target.to_local() if isinstance(target, ShardedLogits) else joined(target)[..., start:end]
    losses = F.kl_div(log_probabilities, other, reduction="none", log_target=log_target)
    if reduction == "none":
        return _like(input, losses)
    total = c.reduce_from_region(losses.sum(dtype=torch.promote_types(losses.dtype, torch.float32)), group)
    counts = {"sum": 1, "batchmean": input.shape[0], "mean": input.numel()}
    return (total / counts[reduction]).to(losses.dtype)


# Parts of losses


def _log_softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Any:
    if not isinstance(input, ShardedLogits) or not _is_last(input, dim):
        return NotImplemented
    logits, group = _local(input)
    return _like(input, vocabulary.log_softmax(logits, group, dtype or result_dtype(_small_log_softmax, logits)))


def _softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Any:
    if not isinstance(input, ShardedLogits) or not _is_last(input, dim):
        return NotImplemented
    logits, group = _local(input)
    return _like(input, vocabulary.softmax(logits, group, dtype or result_dtype(_small_softmax, logits)))


def _log_sum_exp(input: Tensor, dim: Any, keepdim: bool = False) -> Any:
    if not isinstance(input, ShardedLogits) or not _is_last(input, dim) or not input.is_floating_point():
        return NotImplemented
    logits, group = _local(input)
    result = vocabulary.log_sum_exp(logits, group, result_dtype(_small_log_sum_exp, logits))
    return result.unsqueeze(-1) if keepdim else result


def _gather(input: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Any:
    if not isinstance(input, ShardedLogits) or isinstance(index, DTensor) or not _is_last(input, dim):
        return NotImplemented
    logits, group = _local(input)
    return vocabulary.picked(logits, index, group, input.shape[-1])


def _items(input: Tensor, index: Any) -> Any:
    """Items along the leading dims, picked by masks: those that every rank has of its own slice."""
    if not isinstance(input, ShardedLogits):
        return NotImplemented
    items = index if isinstance(index, tuple) else (index,)
    masks = [item for item in items if isinstance(item, Tensor) and item.dtype == torch.bool]
    used = sum(item.ndim if isinstance(item, Tensor) and item.dtype == torch.bool else 1 for item in items)
    if not masks or used >= input.ndim or any(item is None or item is Ellipsis for item in items):
        return NotImplemented
    return _like(input, input.to_local()[joined(index)])


def _parts(split: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """``split`` along a leading dim."""

    def parts(input: Tensor, sizes: Any = None, dim: int = 0, **named: Any) -> Any:
        if not isinstance(input, ShardedLogits) or named or dim in (-1, input.ndim - 1):
            return NotImplemented
        logits = input.to_local()
        pieces = split(logits, dim) if sizes is None else split(logits, sizes, dim)
        return tuple(_like(input, piece) for piece in pieces)

    return parts


# What torch is asked about the dtype of a result


def _small_cross_entropy(x: Tensor) -> Tensor:
    return F.cross_entropy(x, torch.zeros(x.shape[:-1], dtype=torch.long, device=x.device))


def _small_nll_loss(x: Tensor) -> Tensor:
    return F.nll_loss(x, torch.zeros(x.shape[:-1], dtype=torch.long, device=x.device))


def _small_log_softmax(x: Tensor) -> Tensor:
    return x.log_softmax(-1)


def _small_softmax(x: Tensor) -> Tensor:
    return x.softmax(-1)


def _small_log_sum_exp(x: Tensor) -> Tensor:
    return x.logsumexp(-1)


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, whose dtype follows ``dim`` where it is a method, or torch's function."""

    def method(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
        return function(input, dim, dtype=dtype)

    return method


_ON_SHARDS: dict[Any, Callable[..., Any]] = {
    F.cross_entropy: _cross_entropy,
    F.nll_loss: _nll_loss,
    F.kl_div: _kl_div,
    F.log_softmax: _log_softmax,
    torch.log_softmax: _method(_log_softmax),
    Tensor.log_softmax: _method(_log_softmax),
    F.softmax: _softmax,
    torch.softmax: _method(_softmax),
    Tensor.softmax: _method(_softmax),
    torch.logsumexp: _log_sum_exp,
    Tensor.logsumexp: _log_sum_exp,
    torch.gather: _gather,
    Tensor.gather: _gather,
    Tensor.__getitem__: _items,
    torch.split: _parts(torch.split),
    Tensor.split: _parts(torch.split),
    torch.chunk: _parts(torch.chunk),
    Tensor.chunk: _parts(torch.chunk),
}
