"""What experts that are modules of their own are called with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardwright._torch import tree_flatten, tree_unflatten
from shardwright.errors import UnsupportedError


@dataclass(frozen=True)
class Form:
    """How a call looks without its tensors: what else it has, and where the tensors stand."""

    spec: Any
    others: tuple[Any, ...]
    places: tuple[int, ...]

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's arguments with these tensors."""
        leaves = list(self.others)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self.spec)
        return args, kwargs


@dataclass
class ExpertCall:
    """One call of an expert.

    Attributes:
        expert: its place in the loop.
        form: the call without its tensors.
        tensors: the first has the features of a token in its last dim.
        with_gradient: whether the code wants gradients of this call, rather than make it under ``torch.no_grad``.
    """

    expert: int
    form: Form
    tensors: list[Tensor]
    with_gradient: bool = True

    @classmethod
    def of(cls, expert: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExpertCall:
        """The call with these arguments.

        Raises:
            UnsupportedError: they are no rows of tokens.
        """
        leaves, spec = tree_flatten((args, kwargs))
        places = tuple(n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        form = Form(spec, tuple(None if n in places else x for n, x in enumerate(leaves)), places)
        call = cls(expert, form, [leaves[place] for place in places], torch.is_grad_enabled())
        if not places or call.tensors[0].ndim < 2 or any(x.shape[: len(call.lead)] != call.lead for x in call.tensors):
            raise UnsupportedError(
                "An expert is called with something else than rows of tokens (tensors of the shapes "
                f"{[tuple(x.shape) for x in call.tensors]}), so it cannot be computed on another rank. Leave ep out."
            )
        return call

    @property
    def lead(self) -> torch.Size:
        """How the tokens are arranged."""
        return self.tensors[0].shape[:-1]

    @property
    def count(self) -> int:
        """How many tokens there are."""
        return self.lead.numel()

    def rows(self) -> list[Tensor]:
        """The tensors with a row for each token."""
        return [x.reshape(self.count, *x.shape[len(self.lead) :]) for x in self.tensors]


@dataclass(frozen=True)
class Called:
    """What the experts of a loop are called with.

    Attributes:
        form: of every call.
        tails: of each tensor, the shape of what belongs to one token.
    """

    form: Form
    tails: tuple[tuple[int, ...], ...]

    @classmethod
    def by(cls, calls: Sequence[ExpertCall]) -> Called:
        """What all of ``calls`` have in common.

        Raises:
            UnsupportedError: they differ, or there are none.
        """
        found = {(call.form, tuple(tuple(x.shape[len(call.lead) :]) for x in call.tensors)) for call in calls}
        if len(found) != 1:
            raise UnsupportedError(
                f"Experts of one layer are called in {len(found)} ways that differ in more than their tokens, so they "
                "cannot be computed on other ranks. Leave ep out."
            )
        return cls(*found.pop())
