"""Tensor arguments that hold an entry per attention head (an ALiBi bias), cut to one rank's heads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ArgumentCut:
    """One argument that is cut.

    Attributes:
        argument: its name in the module's forward.
        dim: the dim that is cut.
        heads: the dim's entries come in groups of so many, one per head; of each group, a rank gets its share.
    """

    argument: str
    dim: int
    heads: int

    def __str__(self) -> str:
        return f"{self.argument}:{self.dim}:{self.heads}"

    def take(self, x: Tensor, rank: int, size: int) -> Tensor:
        """What ``rank`` of ``size`` gets of the argument."""
        groups = x.unflatten(self.dim, (-1, self.heads))
        share = self.heads // size
        return groups.narrow(self.dim + 1, rank * share, share).flatten(self.dim, self.dim + 1)
