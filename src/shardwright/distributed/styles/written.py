"""What may follow the colon in a plan's style string.

======================== ====================================================================================
``packed_colwise:3``     the weight packs three equal pieces (``packed_rowwise`` likewise)
``mla_kv_a_proj:64``     the last 64 features go to this rank's heads directly
``fused_qkv:64,32,32``   blocks of 64, 32 and 32 features, each cut in consecutive parts
``fused_qkv:64,32/2``    ... the second made of two parts (key-value heads), which more ranks than two share
======================== ====================================================================================
"""

from __future__ import annotations

import re
from typing import Any

_BLOCKS = re.compile(r"[1-9]\d*(/[1-9]\d*)?(,[1-9]\d*(/[1-9]\d*)?)*")


def written_options(style: str, argument: str) -> dict[str, Any] | None:
    """The options that ``style:argument`` stands for; None where it means nothing."""
    if not argument:
        return {}
    if style == "fused_qkv":
        return {"blocks": _blocks(argument)} if _BLOCKS.fullmatch(argument) else None
    if not argument.isdigit() or int(argument) < 1:
        return None
    if style == "mla_kv_a_proj":
        return {"rope_dim": int(argument)}
    return {"pieces": int(argument)} if style.startswith("packed_") else None


def _blocks(argument: str) -> tuple[tuple[int, int], ...]:
    pairs = (block.partition("/") for block in argument.split(","))
    return tuple((int(width), int(parts or 0)) for width, _, parts in pairs)


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
