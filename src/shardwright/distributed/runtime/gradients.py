"""Tensors that are what they were, but for the gradients that backward gives them or others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class _WithOthers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.like = [(other.shape, other.dtype, other.device) for other in others]
        ctx.save_for_backward(x.new_empty(0))  # a checkpoint repeats what comes before the last tensor that is saved
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)


def with_scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """``x``, whose gradient is ``factor`` times what comes."""
    return x if factor == 1 or not x.requires_grad else _Scaled.apply(x, factor)


def with_others_in_graph(x: Tensor, others: Iterable[Tensor]) -> Tensor:
    """``x``, which also has those of ``others`` in its graph that want gradients: they get zeros."""
    return _WithOthers.apply(x, *(other for other in others if other.requires_grad))
