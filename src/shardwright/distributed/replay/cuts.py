"""How the features of a tensor are dealt out to the ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardwright.distributed.styles.written import features_of_rank


@dataclass(frozen=True)
class Cut:
    """Blocks of features laid end to end, each dealt out in ``pieces``.

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
        if not self.blocks:
            return x
        return x.index_select(dim, self.indices(x.shape[dim], rank, size))

    def fits(self, length: int) -> bool:
        return not self.blocks or sum(width for width, _ in self.blocks) == length


WHOLE = Cut()
# Numbers of equal blocks that fused layers are looked at for: q|k|v, gate|up, and those in up to four parts (CodeGen).
PACKED = (2, 3, 4, 6, 8, 12)


def contiguous(width: int) -> Cut:
    """One slice per rank, in ``torch.chunk``'s sizes."""
    return Cut(((width, 0),))


def packed(width: int, blocks: int) -> Cut:
    """``blocks`` equal blocks, each cut."""
    return Cut(((width // blocks, 0),) * blocks)


def cut_from_masks(masks: list[Tensor], *, equal_only: bool = False) -> Cut | None:
    """The cut under which each rank holds all that it depends on, or None.

    Args:
        masks: per rank, a bool vector: which features this rank's share of the result depends on.
        equal_only: only contiguous and equally packed cuts.
    """
    width = masks[0].numel()
    size = len(masks)
    if not any(bool(mask.any()) for mask in masks):
        return None
    guesses = [contiguous(width)] + [packed(width, n) for n in PACKED if width % n == 0 and (width // n) % size == 0]
    if not equal_only:
        guesses += _unequal(masks)
    for cut in guesses:
        if all(_covers(cut, mask, rank, size) for rank, mask in enumerate(masks)):
            return cut
    return None


def _covers(cut: Cut, mask: Tensor, rank: int, size: int) -> bool:
    """Whether rank's share is all that it needs, and it needs something in it."""
    held = torch.zeros_like(mask)
    held[cut.indices(mask.numel(), rank, size)] = True
    return not bool((mask & ~held).any())


def _unequal(masks: list[Tensor]) -> list[Cut]:
    """Blocks of different widths: one begins wherever a run of the first rank's features begins."""
    width, size = masks[0].numel(), len(masks)
    runs = _runs(masks[0])
    starts = [start for start, _ in runs]
    if not starts or starts[0] != 0 or len(starts) > 6:
        return []
    blocks = []
    for start, end, run in zip(starts, [*starts[1:], width], runs, strict=True):
        block, piece = end - start, run[1] - run[0]
        if block % piece:
            return []
        count = block // piece
        blocks.append((block, count if count < size else 0))
    return [Cut(tuple(blocks))]


def _runs(mask: Tensor) -> list[tuple[int, int]]:
    """Start and end of every stretch of True."""
    edges = torch.diff(mask.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int))
    return list(zip((edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist(), strict=True))
