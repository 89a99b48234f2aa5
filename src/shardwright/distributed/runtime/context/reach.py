"""Which keys the queries of every context-parallel rank look at, and the exchange of these alone.

With sliding windows, chunks or packed documents a rank looks at its own positions and at some before them. Which, is
read from the mask, that every rank has whole: nothing has to be known of what made it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from shardwright._torch import without_values
from shardwright.distributed.runtime import collectives as c
from shardwright.distributed.runtime.context.parts import Split

Reach = tuple[tuple[int, int], ...]  # for every rank, the first key that its queries look at, and one behind the last


def reach_of(mask: Any, kwargs: dict[str, Any], split: Split) -> Reach | None:
    """The keys of each rank, in positions of the whole sequence; None where the mask does not tell.

    A mask without values (in a trace) tells nothing: the window that the function is told of stands for it.

    Args:
        mask: whole, ``[batch, heads or 1, positions, positions]``; boolean, or floating and added to the scores.
        kwargs: of the attention function.
        split: of the sequence.
    """
    length = split.length
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[-2:] != (length, length):
        return None
    if any(isinstance(x, Tensor) and x.ndim > 2 and length in x.shape[-2:] for x in kwargs.values()):
        return None  # a bias for pairs of positions
    if without_values(mask):
        window = window_of(kwargs)
        return tuple((max(start - window + 1, 0), end) for start, end in split.bounds) if window else None
    if mask.dtype is not torch.bool and not mask.is_floating_point():
        return None
    table = torch.stack([_looked_at(mask[..., start:end, :]) for start, end in split.bounds]).cpu()
    found = [keys.nonzero().flatten().tolist() for keys in table]
    return tuple((keys[0], keys[-1] + 1) if keys else own for keys, own in zip(found, split.bounds, strict=True))


def window_of(kwargs: dict[str, Any]) -> int | None:
    """How many positions a query looks at, as far as transformers tells the attention function; its own among them."""
    window = kwargs.get("sliding_window")
    return window if isinstance(window, int) and window > 0 else None


def _looked_at(rows: Tensor) -> Tensor:
    """Whether any of ``rows`` looks at a key, for every key.

    A row of a boolean mask that looks at none has a result of zeros. One of a mask that is added weighs all keys alike,
    since the scores vanish beside the least number that there is.
    """
    if rows.dtype is torch.bool:
        return rows.flatten(0, -2).any(0)
    looks = (rows > torch.finfo(rows.dtype).min / 2).flatten(0, -2)
    return looks.any(0) | ~looks.any(1).all()


def sends_less(reach: Reach, split: Split) -> bool:
    """Whether the rank that sends or receives most, in an exchange of what is looked at, has less to do than gathering.

    Gathering, every rank receives all parts but its own.
    """
    ranks = range(split.group.size)
    amounts = [[_size(_both(split.bounds[a], reach[b])) if a != b else 0 for b in ranks] for a in ranks]
    most = max(max(map(sum, amounts)), max(map(sum, zip(*amounts, strict=True))))
    return most < split.widest * (split.group.size - 1)


def _both(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    """The positions that are in two ranges; an empty range begins and ends at one place."""
    start = max(one[0], other[0])
    return start, max(start, min(one[1], other[1]))


def _size(positions: tuple[int, int]) -> int:
    return positions[1] - positions[0]


def fetched(x: Tensor, split: Split, reach: Reach) -> Tensor:
    """Of what the ranks have in parts, the positions that this rank looks at. Gradients of each are summed.

    Args:
        x: this rank's part.
    """
    rank, (first, _) = split.group.rank, split.mine
    x = x.movedim(split.dim, 0)
    pieces = [x[a - first : b - first] for a, b in (_both(split.mine, wanted) for wanted in reach)]
    own, pieces[rank] = pieces[rank], x[:0]
    coming = [_size(_both(part, reach[rank])) if other != rank else 0 for other, part in enumerate(split.bounds)]
    came = list(c.exchange(torch.cat(pieces), list(map(len, pieces)), coming, split.group).split(coming))
    came[rank] = own
    return torch.cat(came).movedim(0, split.dim).contiguous()


def with_all_keys(weights: Tensor, keys: tuple[int, int], length: int) -> Tensor:
    """The weights of ``length`` keys: those that were not looked at have none."""
    return pad(weights, (keys[0], length - keys[1]))
