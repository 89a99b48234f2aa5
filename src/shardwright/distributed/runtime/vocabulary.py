"""Log-sum-exp, softmax and cross entropy over a vocabulary of which every rank holds a slice.

Each is computed in float32 at least and rounded once, as torch's own kernels do, whatever the dtype of the logits. What
autograd keeps is kept in the result's dtype. The loss is Megatron-LM's vocabulary-parallel cross-entropy (Shoeybi et
al. 2019, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shardwright.distributed.runtime import collectives as c
from shardwright.distributed.runtime.dtypes import at_least_float32
from shardwright.errors import UnsupportedError


def refuse_second_derivative() -> None:
    """Raise in a backward that is itself to be differentiated."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise UnsupportedError(
            "The gradient of a loss on sharded logits cannot be differentiated again (create_graph=True). Compute the "
            "loss on whole ones: out.logits.full_tensor()."
        )


def local_index(target: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Where ``target`` lies in a slice of ``width`` entries from ``start``, and whether it does at all."""
    mine = (target >= start) & (target < start + width)
    return torch.where(mine, target - start, 0), mine


def _pick(x: Tensor, index: Tensor, mine: Tensor) -> Tensor:
    """``x[..., index]`` where it is this rank's, else 0."""
    if not x.shape[-1]:
        return x.new_zeros(index.shape)
    return torch.where(mine, x.gather(-1, index.unsqueeze(-1)).squeeze(-1), 0)


def _highest(logits: Tensor, group: c.Group, dtype: torch.dtype) -> Tensor:
    """The largest entry of each row over all ranks, ``[..., 1]``."""
    local = logits.amax(-1) if logits.shape[-1] else logits.new_full(logits.shape[:-1], -torch.inf)
    return c.all_reduce(local.to(dtype), group, "max").unsqueeze(-1)


class _TokenLoss(torch.autograd.Function):
    """``logits`` [tokens, local vocabulary], ``target`` [tokens] in the whole vocabulary."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        group: c.Group,
        start: int,
        vocabulary: int,
        smoothing: float,
        dtype: torch.dtype,
    ) -> Tensor:
        compute = at_least_float32(dtype)
        highest = _highest(logits, group, compute)
        index, mine = local_index(target, start, logits.shape[-1])
        # One tensor of the logits' size is made, and used three times.
        values = logits.to(compute, copy=True).sub_(highest)
        picked = _pick(values, index, mine)
        total = values.sum(-1) if smoothing else torch.zeros_like(picked)
        exponentials = values.exp_().sum(-1)
        exponentials, picked, total = c.all_reduce(torch.stack([exponentials, picked, total]), group).unbind(0)
        normaliser = exponentials.log()
        log_probabilities = values.copy_(logits).sub_(highest).sub_(normaliser.unsqueeze(-1))
        ctx.save_for_backward(log_probabilities.to(dtype), index, mine)
        ctx.vocabulary, ctx.smoothing, ctx.dtype = vocabulary, smoothing, logits.dtype
        loss = normaliser - (1 - smoothing) * picked
        return loss - total * (smoothing / vocabulary) if smoothing else loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        log_probabilities, index, mine = ctx.saved_tensors
        result = log_probabilities.to(grad.dtype, copy=True).exp_()
        if ctx.smoothing:
            result -= ctx.smoothing / ctx.vocabulary
        if result.shape[-1]:
            hit = torch.where(mine, ctx.smoothing - 1.0, 0.0).to(result.dtype)
            result.scatter_add_(-1, index.unsqueeze(-1), hit.unsqueeze(-1))
        return result.mul_(grad.unsqueeze(-1)).to(ctx.dtype), None, None, None, None, None, None


def token_losses(
    logits: Tensor, target: Tensor, group: c.Group, vocabulary: int, smoothing: float, dtype: torch.dtype
) -> Tensor:
    """Cross-entropy of each token, in float32 at least: not rounded yet.

    Args:
        logits: this rank's slice ``[tokens, local vocabulary]``.
        target: ``[tokens]``, entries of the whole vocabulary of ``vocabulary`` entries; others give nonsense.
        smoothing: label smoothing.
        dtype: in which torch would return the loss.
    """
    start, _ = group.bounds(vocabulary)
    return _TokenLoss.apply(logits, target, group, start, vocabulary, smoothing, dtype)


class _LogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: c.Group, dtype: torch.dtype) -> Tensor:
        compute = at_least_float32(dtype)
        shifted = logits.to(compute) - _highest(logits, group, compute)
        result = shifted.sub_(c.all_reduce(shifted.exp().sum(-1), group).log().unsqueeze(-1)).to(dtype)
        ctx.save_for_backward(result)
        ctx.group, ctx.dtype = group, logits.dtype
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        refuse_second_derivative()
        (result,) = ctx.saved_tensors
        grad = grad.to(at_least_float32(grad.dtype))
        total = c.all_reduce(grad.sum(-1), ctx.group).unsqueeze(-1)
        return (grad - result.to(grad.dtype).exp() * total).to(ctx.dtype), None, None


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: c.Group, dtype: torch.dtype) -> Tensor:
        compute = at_least_float32(dtype)
        exponentials = (logits.to(compute) - _highest(logits, group, compute)).exp_()
        result = exponentials.div_(c.all_reduce(exponentials.sum(-1), group).unsqueeze(-1)).to(dtype)
        ctx.save_for_backward(result)
        ctx.group, ctx.dtype = group, logits.dtype
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        refuse_second_derivative()
        (result,) = ctx.saved_tensors
        compute = at_least_float32(grad.dtype)
        result, grad = result.to(compute), grad.to(compute)
        total = c.all_reduce((grad * result).sum(-1), ctx.group).unsqueeze(-1)
        return ((grad - total) * result).to(ctx.dtype), None, None


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: c.Group, dtype: torch.dtype) -> Tensor:
        compute = at_least_float32(dtype)
        highest = _highest(logits, group, compute)
        highest = highest.masked_fill(highest.isinf(), 0)  # a row of -inf gives -inf, as torch's does, and not NaN
        exponentials = (logits.to(compute) - highest).exp_().sum(-1)
        result = c.all_reduce(exponentials, group).log() + highest.squeeze(-1)
        ctx.save_for_backward(logits, result)
        return result.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        refuse_second_derivative()
        logits, result = ctx.saved_tensors
        probabilities = (logits.to(result.dtype) - result.unsqueeze(-1)).exp_()
        return probabilities.mul_(grad.unsqueeze(-1)).to(logits.dtype), None, None


def log_softmax(logits: Tensor, group: c.Group, dtype: torch.dtype) -> Tensor:
    """This rank's slice of the log-softmax over the last dim, which the ranks hold in slices; of ``dtype``."""
    return _LogSoftmax.apply(logits, group, dtype)


def softmax(logits: Tensor, group: c.Group, dtype: torch.dtype) -> Tensor:
    """This rank's slice of the softmax over the last dim, which the ranks hold in slices; of ``dtype``."""
    return _Softmax.apply(logits, group, dtype)


def log_sum_exp(logits: Tensor, group: c.Group, dtype: torch.dtype) -> Tensor:
    """The log-sum-exp over the last dim, which the ranks hold in slices: equal on every rank, of ``dtype``."""
    return _LogSumExp.apply(logits, group, dtype)


def picked(logits: Tensor, index: Tensor, group: c.Group, vocabulary: int) -> Tensor:
    """``logits.gather(-1, index)`` where every rank holds a slice: equal on every rank."""
    start, _ = group.bounds(vocabulary)
    local, mine = local_index(index, start, logits.shape[-1])
    if not logits.shape[-1]:
        mine_only = index.new_zeros(index.shape, dtype=logits.dtype) + logits.sum(-1, keepdim=True)
    else:
        leading = tuple(slice(0, n) for n in index.shape[:-1])
        mine_only = torch.where(mine, logits[leading].gather(-1, local), 0)
    return c.reduce_from_region(mine_only, group)
