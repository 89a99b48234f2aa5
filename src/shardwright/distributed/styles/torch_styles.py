"""torch's own ``ParallelStyle`` objects, as plans written for torch, torchtitan or Automodel hold them.

Their role is taken over, by name; their layouts are not, because sequence parallelism is laid over any plan here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
)

from shardwright.distributed.styles.base import Style
from shardwright.errors import PlanError

LAYOUT_ONLY = (PrepareModuleInput, PrepareModuleOutput, PrepareModuleInputOutput)
"""Styles that lay out tensors between modules and say nothing about parameters: here that follows from the rest."""


def style_name(glob: str, style: ParallelStyle) -> str:
    """The style name that a torch style stands for.

    Raises:
        PlanError: a style that has none, such as one that its user wrote.
    """
    if isinstance(style, Style):
        return style.as_written
    if isinstance(style, SequenceParallel):
        # Along another dim than the sequence: a norm on this rank's heads (torchtitan's q_norm and k_norm).
        return "sequence_parallel" if _splits_sequence(style) else "replicated_with_grad_allreduce"
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


def _splits_sequence(style: SequenceParallel) -> bool:
    return style.sequence_sharding == (Shard(1),)


def asks_for_sequence_parallel(styles: Iterable[Any]) -> bool:
    """Whether styles split the residual stream along the sequence."""
    return any(
        (isinstance(style, SequenceParallel) and _splits_sequence(style))
        or (isinstance(style, PrepareModuleInput) and Shard(1) in (style.input_layouts or ()))
        or (isinstance(style, RowwiseParallel) and style.output_layouts == (Shard(1),))
        or (isinstance(style, ColwiseParallel) and style.input_layouts == (Shard(1),))
        for style in styles
    )
