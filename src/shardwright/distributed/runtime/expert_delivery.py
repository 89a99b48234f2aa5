"""Experts that are modules of their own: each rank has a slice of every one, and gets the whole of its own ones.

A parameter cannot lie on one rank alone: DTensor knows parameters that all ranks of a mesh share. So between steps the
weights of every expert are cut along their first dim over all ranks, as FSDP2 cuts weights, and when a layer runs, one
all-to-all brings every expert to the rank that computes it. Backward sends the slices of its gradients back. A rank
receives ``1 / ep`` of the layer's experts, where FSDP2 alone would gather them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardwright.distributed.runtime import collectives as c


@dataclass(frozen=True)
class Weight:
    """A parameter of an expert.

    Attributes:
        expert: the place of the expert.
        shape: of the whole parameter.
    """

    expert: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Delivery:
    """Which weights go where.

    Attributes:
        weights: in the order of the slices.
        experts: how many experts there are.
        gradient_factor: what gradients are multiplied by on their way back.
    """

    weights: tuple[Weight, ...]
    experts: int
    group: c.Group
    gradient_factor: float

    def owner(self, weight: Weight) -> int:
        """The rank that computes the weight's expert."""
        return weight.expert // -(-self.experts // self.group.size)

    def own(self) -> list[int]:
        """The places of the weights that come to this rank."""
        return [n for n, weight in enumerate(self.weights) if self.owner(weight) == self.group.rank]

    def slice_shape(self, weight: Weight, rank: int) -> tuple[int, ...]:
        """The shape of the slice of a weight that ``rank`` has."""
        each = -(-weight.shape[0] // self.group.size)
        rows = min((rank + 1) * each, weight.shape[0]) - min(rank * each, weight.shape[0])
        return (rows, *weight.shape[1:])

    def whole(self, slices: Sequence[Tensor]) -> list[Tensor]:
        """The weights of this rank's experts, whole, from this rank's slices of all weights."""
        ranks, here = range(self.group.size), self.own()
        going = [[x for x, w in zip(slices, self.weights, strict=True) if self.owner(w) == rank] for rank in ranks]
        coming = [[self.slice_shape(self.weights[n], rank) for n in here] for rank in ranks]
        return [torch.cat(parts) for parts in zip(*self._exchanged(going, coming, slices[0]), strict=True)]

    def sliced(self, grads: Sequence[Tensor], like: Tensor) -> list[Tensor]:
        """This rank's slices of the gradients of all weights, from those of its experts' weights, whole."""
        ranks = range(self.group.size)
        each = [-(-grad.shape[0] // self.group.size) for grad in grads]
        going = [
            [grad[rank * step : (rank + 1) * step] for grad, step in zip(grads, each, strict=True)] for rank in ranks
        ]
        places = [[n for n, weight in enumerate(self.weights) if self.owner(weight) == rank] for rank in ranks]
        coming = [[self.slice_shape(self.weights[n], self.group.rank) for n in here] for here in places]
        found: dict[int, Tensor] = {}
        for here, parts in zip(places, self._exchanged(going, coming, like), strict=True):
            found.update(zip(here, parts, strict=True))
        return [found[n] for n in range(len(self.weights))]

    def _exchanged(
        self, going: Sequence[Sequence[Tensor]], coming: Sequence[Sequence[tuple[int, ...]]], like: Tensor
    ) -> list[list[Tensor]]:
        """What each rank has for this one, in the shapes that are known; ``like`` has the dtype and the device."""
        flat = [x.reshape(-1).to(like.dtype) for parts in going for x in parts]
        sizes = [[prod(shape) for shape in shapes] for shapes in coming]
        received = c.all_to_all(
            torch.cat(flat) if flat else like.new_empty(0),
            [sum(x.numel() for x in parts) for parts in going],
            [sum(each) for each in sizes],
            self.group,
        )
        pieces = iter(received.split([size for each in sizes for size in each]))
        return [[next(pieces).view(shape) for shape in shapes] for shapes in coming]


class _Delivered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, delivery: Delivery, *slices: Tensor) -> tuple[Tensor, ...]:
        ctx.delivery = delivery
        ctx.like = slices[0].new_empty(0)
        whole = delivery.whole(slices)
        frozen = [x for n, x in zip(delivery.own(), whole, strict=True) if not ctx.needs_input_grad[2 + n]]
        ctx.mark_non_differentiable(*frozen)
        return token.clone(), *whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        delivery: Delivery = ctx.delivery
        trained = [n for n, needs in enumerate(ctx.needs_input_grad[2:]) if needs]
        found: list[Tensor | None] = [None] * len(delivery.weights)
        if trained:
            own = [grad for n, grad in zip(delivery.own(), grads, strict=True) if n in set(trained)]
            only = Delivery(
                tuple(delivery.weights[n] for n in trained), delivery.experts, delivery.group, delivery.gradient_factor
            )
            for n, grad in zip(trained, only.sliced(own, ctx.like), strict=True):
                found[n] = grad * delivery.gradient_factor
        return token, None, *found


def delivered(token: Tensor, delivery: Delivery, slices: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """``token``, and the whole weights of this rank's experts; a collective, and another one in backward.

    Backward comes to this place on every rank, whatever came to its experts, if ``token`` is used there.
    """
    token, *whole = _Delivered.apply(token, delivery, *slices)
    return token, whole
