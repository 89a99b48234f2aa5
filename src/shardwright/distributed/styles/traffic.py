"""What a style sends over the ``tp`` ranks: stated by the style, counted by the estimate, compared with real runs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Sent:
    """One collective in the forward or backward of a micro-batch.

    Attributes:
        kind: ``"all_reduce"``, ``"all_gather"`` or ``"reduce_scatter"``.
        backward: in backward rather than in forward.
        width: elements of the whole tensor per token.
        float32: always of that dtype, rather than of the one that the model computes in.
    """

    kind: str
    backward: bool
    width: int
    float32: bool = False


@dataclass(frozen=True)
class Site:
    """Where a style works, as far as that decides what it sends.

    Attributes:
        module: the module.
        sequence: whether sequence parallelism splits its output.
        stream: features of the residual stream around it.
        experts_per_token: how many experts see a token, as the model's config states it; 0 where it does not.
    """

    module: nn.Module
    sequence: bool
    stream: int
    experts_per_token: int


def forward(kind: str, width: int) -> Sent:
    return Sent(kind, False, width)


def backward(kind: str, width: int) -> Sent:
    return Sent(kind, True, width)
