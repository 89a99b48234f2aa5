"""Logits that stay sharded on the vocabulary, and losses computed on the shards.

A column-parallel head returns :class:`ShardedLogits`, a DTensor that standard loss code can use as it is:
``F.cross_entropy``, ``log_softmax`` and ``gather`` run on the shards, without ever making a full-vocabulary tensor,
and their backward needs no context manager. Anything else is done by DTensor, which gathers where it must; results that
no longer depend on the vocabulary come back as plain tensors, equal on every rank.

The loss is Megatron-LM's vocabulary-parallel cross-entropy (Shoeybi et al. 2019, section 3).
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
from shardwright.distributed.runtime.implicit import ImplicitDTensor, joined, mark
from shardwright.distributed.runtime.layout import sharded
from shardwright.errors import UnsupportedError


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


def _local(x: ShardedLogits) -> tuple[Tensor, c.Group, int]:
    """This rank's slice, the ranks, and the first vocabulary entry of the slice."""
    group = c.Group.of(x.device_mesh)
    return x.to_local(), group, group.bounds(x.shape[-1])[0]


class _TokenLoss(torch.autograd.Function):
    """Cross-entropy per token. ``logits`` [tokens, local vocabulary], ``target`` [tokens] in the whole vocabulary."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, group: c.Group, start: int, vocabulary: int, smoothing: float
    ) -> Tensor:
        highest = logits.amax(-1) if logits.shape[-1] else logits.new_full(logits.shape[:1], -torch.inf)
        highest = c.all_reduce(highest, group, "max")
        shifted = logits - highest.unsqueeze(-1)
        index, mine = _local_index(target, start, logits.shape[-1])
        picked = _pick(shifted, index, mine)
        total = shifted.sum(-1) if smoothing else torch.zeros_like(picked)
        exponentials = shifted.exp_()
        normaliser, picked, total = c.all_reduce(torch.stack([exponentials.sum(-1), picked, total]), group).unbind(0)
        probabilities = exponentials.div_(normaliser.unsqueeze(-1))
        ctx.save_for_backward(probabilities, index, mine)
        ctx.vocabulary, ctx.smoothing = vocabulary, smoothing
        loss = normaliser.log() - (1 - smoothing) * picked
        return loss - total * (smoothing / vocabulary) if smoothing else loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        _once()
        probabilities, index, mine = ctx.saved_tensors
        result = probabilities - ctx.smoothing / ctx.vocabulary
        if result.shape[-1]:
            hit = torch.where(mine, ctx.smoothing - 1.0, 0.0).to(result.dtype)
            result.scatter_add_(-1, index.unsqueeze(-1), hit.unsqueeze(-1))
        return result.mul_(grad.unsqueeze(-1)), None, None, None, None, None


def _once() -> None:
    """Raise in a backward that is itself to be differentiated."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise UnsupportedError(
            "The gradient of a loss on sharded logits cannot be differentiated again (create_graph=True). Compute the "
            "loss on whole ones: out.logits.full_tensor()."
        )


def _local_index(target: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Where ``target`` lies in a slice of ``width`` entries from ``start``, and whether it does at all."""
    mine = (target >= start) & (target < start + width)
    return torch.where(mine, target - start, 0), mine


def _pick(x: Tensor, index: Tensor, mine: Tensor) -> Tensor:
    """``x[..., index]`` where it is this rank's, else 0."""
    if not x.shape[-1]:
        return x.new_zeros(index.shape)
    return torch.where(mine, x.gather(-1, index.unsqueeze(-1)).squeeze(-1), 0)


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
    if isinstance(target, DTensor):
        target = target.full_tensor()
    logits, group, start = _local(input)
    tokens = target.reshape(-1)
    kept = tokens != ignore_index
    outside = kept & ((tokens < 0) | (tokens >= input.shape[-1]))
    if not torch.compiler.is_compiling() and bool(outside.any()):
        raise IndexError(f"A target is outside the vocabulary of {input.shape[-1]}: {int(tokens[outside][0])}.")
    losses = _TokenLoss.apply(
        logits.reshape(-1, logits.shape[-1]), tokens, group, start, input.shape[-1], label_smoothing
    )
    weights = kept.to(losses.dtype)
    if weight is not None:
        weights = weights * weight[tokens.where(kept, 0)].to(losses.dtype)
    losses = torch.where(kept, losses * weights, 0)
    if reduction == "none":
        return losses.view(target.shape)
    return losses.sum() / weights.sum() if reduction == "mean" else losses.sum()


class _LogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: c.Group) -> Tensor:
        highest = logits.amax(-1) if logits.shape[-1] else logits.new_full(logits.shape[:-1], -torch.inf)
        shifted = logits - c.all_reduce(highest, group, "max").unsqueeze(-1)
        result = shifted - c.all_reduce(shifted.exp().sum(-1), group).log().unsqueeze(-1)
        ctx.save_for_backward(result)
        ctx.group = group
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _once()
        (result,) = ctx.saved_tensors
        return grad - result.exp() * c.all_reduce(grad.sum(-1), ctx.group).unsqueeze(-1), None


def _log_softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Any:
    if not isinstance(input, ShardedLogits) or dim not in (-1, input.ndim - 1):
        return NotImplemented
    logits, group, _ = _local(input)
    return sharded_logits(
        _LogSoftmax.apply(logits if dtype is None else logits.to(dtype), group), input.shape[-1], input.device_mesh
    )


def _gather(input: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Any:
    if not isinstance(input, ShardedLogits) or isinstance(index, DTensor) or dim not in (-1, input.ndim - 1):
        return NotImplemented
    logits, group, start = _local(input)
    local, mine = _local_index(index, start, logits.shape[-1])
    if not logits.shape[-1]:
        picked = index.new_zeros(index.shape, dtype=logits.dtype) + logits.sum(-1, keepdim=True)
    else:
        leading = tuple(slice(0, n) for n in index.shape[:-1])
        picked = torch.where(mine, logits[leading].gather(-1, local), 0)
    return c.reduce_from_region(picked, group)


def _items(input: Tensor, index: Any) -> Any:
    """Items along the leading dims, picked by masks: those that every rank has of its own slice."""
    if not isinstance(input, ShardedLogits):
        return NotImplemented
    items = index if isinstance(index, tuple) else (index,)
    masks = [item for item in items if isinstance(item, Tensor) and item.dtype == torch.bool]
    used = sum(item.ndim if isinstance(item, Tensor) and item.dtype == torch.bool else 1 for item in items)
    if not masks or used >= input.ndim or any(item is None or item is Ellipsis for item in items):
        return NotImplemented
    logits, _, _ = _local(input)
    return sharded_logits(logits[joined(index)], input.shape[-1], input.device_mesh)


def _parts(split: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """``split`` along a leading dim."""

    def parts(input: Tensor, sizes: Any = None, dim: int = 0, **named: Any) -> Any:
        if not isinstance(input, ShardedLogits) or named or dim in (-1, input.ndim - 1):
            return NotImplemented
        logits, _, _ = _local(input)
        pieces = split(logits, dim) if sizes is None else split(logits, sizes, dim)
        return tuple(sharded_logits(piece, input.shape[-1], input.device_mesh) for piece in pieces)

    return parts


_ON_SHARDS: dict[Any, Callable[..., Any]] = {
    F.cross_entropy: _cross_entropy,
    F.log_softmax: _log_softmax,
    torch.gather: _gather,
    Tensor.gather: _gather,
    Tensor.__getitem__: _items,
    torch.split: _parts(torch.split),
    Tensor.split: _parts(torch.split),
    torch.chunk: _parts(torch.chunk),
    Tensor.chunk: _parts(torch.chunk),
}


def _tensor_log_softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
    return _log_softmax(input, dim, dtype=dtype)


_ON_SHARDS |= {torch.log_softmax: _tensor_log_softmax, Tensor.log_softmax: _tensor_log_softmax}
