"""Losses of logits that are split along the sequence, each rank on its positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwright.distributed.runtime.context import parts
from shardwright.distributed.runtime.context.base import ContextTensor
from shardwright.distributed.runtime.dtypes import at_least_float32
from shardwright.distributed.runtime.implicit import joined


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    if size_average is not None or reduce is not None:
        return NotImplemented

    def losses(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(
            logits, labels, weight, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
        )

    return _of_labels(input, target, weight, ignore_index, reduction, losses)


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Any:
    if size_average is not None or reduce is not None:
        return NotImplemented

    def losses(logits: Tensor, labels: Tensor) -> Tensor:
        return F.nll_loss(logits, labels, weight, ignore_index=ignore_index, reduction="none")

    return _of_labels(input, target, weight, ignore_index, reduction, losses)


def _of_labels(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    losses: Callable[[Tensor, Tensor], Tensor],
) -> Any:
    """Mean, sum or each of the losses of ``input`` [tokens, classes] or [batch, classes, tokens]."""
    if not isinstance(input, ContextTensor) or input.ndim < 2 or target.is_floating_point():
        return NotImplemented
    dim = input.dealt.dim if input.ndim == 2 else input.dealt.dim - 1  # the classes are the second dim
    if input.dealt.dim == 1 or target.ndim != input.ndim - 1:
        return NotImplemented
    split = input.dealt.at(dim)
    if isinstance(target, ContextTensor) and target.dealt == split:
        labels = target.inside
    else:
        target = target.whole() if isinstance(target, ContextTensor) else joined(target)
        labels = parts.part(target, split)
    found = losses(input.inside, labels)
    if reduction == "none":
        return input.like(found, split)
    wide = found.to(at_least_float32(found.dtype))
    total = parts.summed(wide.sum(), split)
    if reduction == "sum":
        return total.to(found.dtype)
    kept = labels != ignore_index
    counts = kept.to(wide.dtype) if weight is None else weight.to(wide.dtype)[labels.where(kept, 0)] * kept
    with torch.no_grad():
        count = parts.summed(counts.sum(), split)
    return (total / count).to(found.dtype)


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Any:
    if not isinstance(input, ContextTensor) or input.shape != target.shape or size_average is not None:
        return NotImplemented
    if reduce is not None or (isinstance(target, ContextTensor) and target.dealt != input.dealt):
        return NotImplemented
    other = target.inside if isinstance(target, ContextTensor) else parts.part(joined(target), input.dealt)
    losses = F.kl_div(input.inside, other, reduction="none" if reduction == "none" else "sum", log_target=log_target)
    if reduction == "none":
        return input.like(losses, input.dealt)
    counts = {"sum": 1, "batchmean": input.shape[0], "mean": input.numel()}
    return (parts.summed(losses.to(at_least_float32(losses.dtype)), input.dealt) / counts[reduction]).to(losses.dtype)


LOSSES: dict[Any, Callable[..., Any]] = {F.cross_entropy: cross_entropy, F.nll_loss: nll_loss, F.kl_div: kl_div}
