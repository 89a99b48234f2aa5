"""From what every rank's share depends on to a cut."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from shardwright.distributed.styles.cuts import Cut, contiguous, packed

# Numbers of equal blocks that fused layers are looked at for: q|k|v, gate|up, and those in up to four parts (CodeGen).
PACKED = (2, 3, 4, 6, 8, 12)


def cut_from_masks(masks: Mapping[int, Tensor], size: int, *, equal_only: bool = False) -> Cut | None:
    """The cut under which each rank holds all that it depends on, or None.

    Args:
        masks: rank -> a bool vector: which features this rank's share of the result depends on. The first rank is among
            them; of the others, a sample will do for a guess that is replayed on all.
        size: number of ranks.
        equal_only: only contiguous and equally packed cuts.
    """
    width = masks[0].numel()
    if not any(bool(mask.any()) for mask in masks.values()):
        return None
    guesses = [contiguous(width)] + [packed(width, n) for n in PACKED if width % n == 0 and (width // n) % size == 0]
    if not equal_only:
        guesses += _unequal(masks[0], size)
    for cut in guesses:
        if all(_covers(cut, mask, rank, size) for rank, mask in masks.items()):
            return cut
    return None


def _covers(cut: Cut, mask: Tensor, rank: int, size: int) -> bool:
    """Whether rank's share is all that it needs, and it needs something in it."""
    held = torch.zeros_like(mask)
    held[cut.indices(mask.numel(), rank, size)] = True
    return not bool((mask & ~held).any())


def _unequal(first: Tensor, size: int) -> list[Cut]:
    """Blocks of different widths: one begins wherever a run of the first rank's features begins."""
    width, runs = first.numel(), _runs(first)
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
