"""How the features of a tensor are dealt out to the ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """Blocks of features laid end to end, each dealt out in ``pieces``.

    A subclass that deals them out in another way says so in :meth:`indices`.

    Attributes:
        blocks: ``(width, pieces)`` of each block. A rank takes consecutive pieces of every block; where there are
            fewer pieces than ranks, neighbouring ranks share one (key-value heads). No blocks: everything, whole.
            ``pieces`` 0: the block is cut in ``torch.chunk``'s sizes, which need not be equal.
    """

    blocks: tuple[tuple[int, int], ...] = ()

    @property
    def shared(self) -> bool:
        """Whether a block is whole, or may be shared between ranks."""
        return any(pieces for _, pieces in self.blocks)

    def indices(self, length: int, rank: int, size: int) -> Tensor:
        """The features that ``rank`` of ``size`` holds of ``length``."""
        if not self.blocks:
            return torch.arange(length)
        return torch.tensor(features_of_rank(self.blocks, rank, size))

    def take(self, x: Tensor, dim: int, rank: int, size: int) -> Tensor:
        """This rank's features of ``x`` along ``dim``."""
        return x if self == WHOLE else x.index_select(dim, self.indices(x.shape[dim], rank, size))

    def fits(self, length: int) -> bool:
        return not self.blocks or sum(width for width, _ in self.blocks) == length


@dataclass(frozen=True)
class Picked(Cut):
    """A cut that lists every rank's features."""

    features: tuple[tuple[int, ...], ...] = ()

    def indices(self, length: int, rank: int, size: int) -> Tensor:
        return torch.tensor(self.features[rank])


WHOLE = Cut()


def contiguous(width: int) -> Cut:
    """One slice per rank, in ``torch.chunk``'s sizes."""
    return Cut(((width, 0),))


def packed(width: int, pieces: int) -> Cut:
    """``pieces`` equal blocks, each cut."""
    return Cut(((width // pieces, 0),) * pieces)


def features_of_rank(blocks: tuple[tuple[int, int], ...], rank: int, size: int) -> tuple[int, ...]:
    """The features that ``rank`` of ``size`` uses of a layer made of ``blocks`` (width, parts).

    A rank takes consecutive parts of each block; where there are fewer parts than ranks, neighbours share one. No
    parts: as many as ranks, in ``torch.chunk``'s sizes.
    """
    features: list[int] = []
    start = 0
    for width, parts in blocks:
        low, high = _bounds(width, parts, rank, size)
        features += range(start + low, start + high)
        start += width
    return tuple(features)


def _bounds(width: int, parts: int, rank: int, size: int) -> tuple[int, int]:
    if not parts:
        chunk = -(-width // size)
        return min(rank * chunk, width), min((rank + 1) * chunk, width)
    first = rank * parts // size
    after = max(first + 1, (rank + 1) * parts // size)
    return first * (width // parts), after * (width // parts)
