"""Tensors of which every context-parallel rank has a part of the sequence, and the way from a whole one and back.

Two rules for gradients. *Inside* of a model, the gradient that a rank has of a plain tensor (a parameter, a mask, a
table of positions) comes from this rank's part of the work alone: the true gradient is the mean over the ranks, which
is what FSDP2 takes of parameters. So every rank works on its part, times the number of ranks, and nothing has to be
known of the parameters: whichever a rank has used, wherever and how often, their mean is right. *Outside*, in a loss
that the user computes from what the model returned, every rank does the same work on plain tensors, and their gradients
are whole and equal on every rank.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from shardwright.distributed.runtime import collectives as c
from shardwright.distributed.runtime.gradients import with_scaled_gradient


@dataclass(frozen=True)
class Split:
    """How one dim of a tensor is dealt out to the ranks of a group.

    The dim is made of ``outer`` runs of ``length`` positions (a batch and a sequence laid out as one dim have a run for
    every sequence). Of each run, rank ``r`` has the positions ``bounds[r]``, from a first to one behind the last.

    Attributes:
        group: the ranks.
        dim: which dim, not negative.
        inside: whether gradients are those of the inside of a model, or those of the code around it.
    """

    group: c.Group
    dim: int
    length: int
    bounds: tuple[tuple[int, int], ...]
    outer: int = 1
    inside: bool = True

    @classmethod
    def even(cls, group: c.Group, dim: int, length: int, *, inside: bool = True) -> Split:
        """The usual one: consecutive chunks in ``torch.chunk``'s sizes."""
        chunk = -(-length // group.size)
        ends = [min(rank * chunk, length) for rank in range(group.size + 1)]
        return cls(group, dim, length, tuple(itertools.pairwise(ends)), inside=inside)

    @property
    def mine(self) -> tuple[int, int]:
        """This rank's positions."""
        return self.bounds[self.group.rank]

    @property
    def total(self) -> int:
        """How long the dim is in all."""
        return self.outer * self.length

    @property
    def local(self) -> int:
        """How long it is on this rank."""
        start, end = self.mine
        return self.outer * (end - start)

    @property
    def is_even(self) -> bool:
        """Whether this is the usual way to deal out one run."""
        return self.outer == 1 and self.bounds == Split.even(self.group, self.dim, self.length).bounds

    @property
    def widest(self) -> int:
        return max(end - start for start, end in self.bounds)

    def narrowed(self, start: int, end: int) -> Split:
        """What is left of every run from ``start`` to ``end``: no position changes its rank."""
        bounds = tuple(
            (min(max(a - start, 0), end - start), min(max(b - start, 0), end - start)) for a, b in self.bounds
        )
        return replace(self, length=end - start, bounds=bounds)

    def at(self, dim: int) -> Split:
        """The same for another dim."""
        return replace(self, dim=dim)


def runs(x: Tensor, split: Split) -> Tensor:
    """``x`` with the runs in a dim of their own before the positions, unless there is only one."""
    return x if split.outer == 1 else x.unflatten(split.dim, (split.outer, -1))


def joined_runs(x: Tensor, split: Split) -> Tensor:
    return x if split.outer == 1 else x.flatten(split.dim, split.dim + 1)


def _positions_dim(split: Split) -> int:
    return split.dim + (split.outer > 1)


def cut(x: Tensor, split: Split) -> Tensor:
    """This rank's part of a whole ``x``, a view where there is one run. Differentiable, as any view is."""
    start, end = split.mine
    return joined_runs(runs(x, split).narrow(_positions_dim(split), start, end - start), split)


def gather_parts(x: Tensor, split: Split) -> Tensor:
    """The ranks' parts put together; not differentiable."""
    x, dim = runs(x, split), _positions_dim(split)
    widest = split.widest
    x = padded_to(x, dim, widest)
    if split.is_even:
        return c.all_gather(x, dim, split.length, split.group)
    whole = c.all_gather(x, dim, widest * split.group.size, split.group)
    pieces = [whole.narrow(dim, rank * widest, end - start) for rank, (start, end) in enumerate(split.bounds)]
    return joined_runs(torch.cat(pieces, dim), split)


def sum_parts(x: Tensor, split: Split) -> Tensor:
    """This rank's part of the sum of the ranks' whole ``x``; not differentiable."""
    x, dim = runs(x, split), _positions_dim(split)
    if split.is_even:
        return c.reduce_scatter(x, dim, split.group)
    widest = split.widest
    pieces = [padded_to(x.narrow(dim, start, end - start), dim, widest) for start, end in split.bounds]
    start, end = split.mine
    mine = c.reduce_scatter(torch.cat(pieces, dim), dim, split.group).narrow(dim, 0, end - start)
    return joined_runs(mine, split)


def padded_to(x: Tensor, dim: int, length: int) -> Tensor:
    """``x`` with zeros at the end of a dim, which is ``length`` long then."""
    missing = length - x.size(dim)
    return pad(x, [0, 0] * (x.ndim - 1 - dim) + [0, missing]) if missing else x


class _Whole(torch.autograd.Function):
    """The parts put together. Backward takes this rank's part of the (sum of the) gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, split: Split) -> Tensor:
        ctx.split = split
        return gather_parts(x, split)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        c.refuse_twice()
        return _Part.apply(grad, ctx.split), None


class _Part(torch.autograd.Function):
    """This rank's part: of the sum over the ranks where each has a share, of the tensor where all have the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, split: Split) -> Tensor:
        ctx.split = split
        return sum_parts(x, split) if split.inside else cut(x, split).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Whole.apply(grad, ctx.split), None


class _Sum(torch.autograd.Function):
    """The sum over the ranks, of values and of gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: c.Group) -> Tensor:
        ctx.group = group
        return c.all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grad, ctx.group), None


class _Entering(torch.autograd.Function):
    """``x``, whose gradient is the mean over the ranks of what comes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: c.Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        c.refuse_twice()
        return c.reduce_from_region(grad, ctx.group) / ctx.group.size, None


def part(x: Tensor, split: Split) -> Tensor:
    """This rank's part of a whole ``x``, in memory of its own: what is left of ``x`` can be freed."""
    if split.inside or not x.requires_grad:
        return cut(x, split).clone(memory_format=torch.contiguous_format)
    return _Part.apply(x, split)


def whole(x: Tensor, split: Split) -> Tensor:
    """All of what the ranks have in parts."""
    return _Whole.apply(x, split)


def summed(x: Tensor, split: Split) -> Tensor:
    """The sum over the ranks, equal on all of them, of a value that each has of its part."""
    return _Sum.apply(x, split.group) if split.inside else c.reduce_from_region(x, split.group)


def used_in_part(x: Tensor, split: Split) -> Tensor:
    """A whole ``x`` for work on this rank's part, which uses all of it."""
    return x if split.inside or not x.requires_grad else c.copy_to_region(x, split.group)


def entering(x: Tensor, group: c.Group) -> Tensor:
    """A plain tensor of the outside, for the inside of a model."""
    return _Entering.apply(x, group) if x.requires_grad else x


def arriving(x: Tensor, split: Split) -> Tensor:
    """This rank's part of a tensor of the outside, for the inside of a model."""
    return with_scaled_gradient(x, 1 / split.group.size)


def leaving(x: Tensor, split: Split) -> Tensor:
    """This rank's part of a tensor of the inside, for the outside."""
    return with_scaled_gradient(x, split.group.size)
