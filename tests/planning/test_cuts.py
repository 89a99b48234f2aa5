"""Cuts read off what each rank's share depends on."""

from __future__ import annotations

import pytest
import torch

from shardwright.distributed.planning.derive.masks import cut_from_masks
from shardwright.distributed.styles.cuts import Cut, contiguous, packed


def masks(width: int, *ranks: list[tuple[int, int]]) -> list[torch.Tensor]:
    result = []
    for runs in ranks:
        mask = torch.zeros(width, dtype=torch.bool)
        for start, end in runs:
            mask[start:end] = True
        result.append(mask)
    return result


@pytest.mark.parametrize(
    ("width", "ranks", "expected"),
    [
        (8, [[(0, 4)], [(4, 8)]], contiguous(8)),
        (7, [[(0, 4)], [(4, 7)]], contiguous(7)),
        (8, [[(0, 2), (4, 6)], [(2, 4), (6, 8)]], packed(8, 2)),
        (12, [[(0, 2), (4, 6), (8, 10)], [(2, 4), (6, 8), (10, 12)]], packed(12, 3)),
        (8, [[(0, 2), (4, 5), (6, 7)], [(2, 4), (5, 6), (7, 8)]], Cut(((4, 0), (2, 0), (2, 0)))),
        (6, [[(0, 2), (4, 6)], [(2, 6)]], Cut(((4, 0), (2, 1)))),  # multi-query: both ranks use the one key and value
        (8, [[(0, 4)], [(0, 4)], [(4, 8)], [(4, 8)]], Cut(((8, 2),))),
        (8, [[(0, 1), (2, 4)], [(4, 8)]], contiguous(8)),  # a feature that happened not to matter
        (8, [[(0, 5)], [(4, 8)]], None),
        (8, [[(0, 8)], [(0, 8)]], Cut(((8, 1),))),
        (8, [[], []], None),
    ],
)
def test_cut_from_masks(width: int, ranks: list[list[tuple[int, int]]], expected: Cut | None) -> None:
    assert cut_from_masks(dict(enumerate(masks(width, *ranks))), len(ranks)) == expected


def test_the_parts_of_all_ranks_cover_everything_once() -> None:
    for cut in (contiguous(10), packed(12, 3), Cut(((8, 0), (4, 0)))):
        width = sum(width for width, _ in cut.blocks)
        held = torch.cat([cut.indices(width, rank, 2) for rank in range(2)])
        assert held.sort().values.tolist() == list(range(width))
