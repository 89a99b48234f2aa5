"""torch's own ``ParallelStyle`` objects, as plans written for torch, torchtitan or Automodel hold them.

Their role is taken over, by name; their layouts are not, because sequence parallelism is laid over any plan here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, SequenceParallel

from shardwright.distributed.styles.base import Style
from shardwright.errors import PlanError


def style_name(glob: str, style: ParallelStyle) -> str:
    """The style name that a torch style stands for.

    Raises:
        PlanError: a style that has none, such as ``PrepareModuleInput``.
    """
    if isinstance(style, Style):
        return style.as_written
    if isinstance(style, SequenceParallel):
        return "sequence_parallel"
    if isinstance(style, ColwiseParallel):
        if style.output_layouts == (Replicate(),):
            return "colwise_gather_output"
        # A DTensor output is meant for loss parallelism on a head; inside a block it is a plain slice here.
        return "colwise" if style.use_local_output else "colwise_logits"
    if isinstance(style, RowwiseParallel):
        return "rowwise_split_input" if style.input_layouts == (Replicate(),) else "rowwise"
    raise PlanError(
        f"{glob!r} has the style {type(style).__name__}, which Shardwright cannot prove exact. Use a style name, "
        "ColwiseParallel, RowwiseParallel or SequenceParallel; inputs and outputs of whole modules need no style here."
    )


def asks_for_sequence_parallel(styles: Iterable[Any]) -> bool:
    """Whether torch styles split the residual stream along the sequence."""
    return any(
        isinstance(style, SequenceParallel)
        or (isinstance(style, RowwiseParallel) and style.output_layouts == (Shard(1),))
        or (isinstance(style, ColwiseParallel) and style.input_layouts == (Shard(1),))
        for style in styles
        if not isinstance(style, Style)
    )
