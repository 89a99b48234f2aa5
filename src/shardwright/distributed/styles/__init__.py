"""What a plan can name: every tensor- and sequence-parallel behaviour, as torch ``ParallelStyle``s.

:func:`make_style` turns a style string of a plan into one. To add a style: a class in the file it belongs to, a line in
``_CLASSES``, a test (``CONTRIBUTING.md``).
"""

from __future__ import annotations

from typing import Any

from shardwright.distributed.styles.base import Style
from shardwright.distributed.styles.embedding import EmbeddingColwise, EmbeddingRowwise, EmbeddingSlice
from shardwright.distributed.styles.experts import (
    ExpertDispatch,
    GroupedGemm,
    IdentityExpert,
    SpreadExperts,
    SummedOutput,
    TensorParallelExperts,
)
from shardwright.distributed.styles.key_value_heads import KeyValueHeads
from shardwright.distributed.styles.linear import (
    Colwise,
    ColwiseGatherOutput,
    ColwiseLogits,
    FusedQkv,
    Rowwise,
    RowwiseSplitInput,
)
from shardwright.distributed.styles.packed import PackedColwise, PackedRowwise
from shardwright.distributed.styles.replicated import (
    LocalParams,
    MlaKvA,
    PartOfSum,
    Replicated,
    ReplicatedPartialGradient,
    SequenceParallelNorm,
)
from shardwright.errors import PlanError

_CLASSES: tuple[type[Style], ...] = (
    Colwise,
    ColwiseGatherOutput,
    ColwiseLogits,
    FusedQkv,
    PackedColwise,
    KeyValueHeads,
    Rowwise,
    RowwiseSplitInput,
    PackedRowwise,
    EmbeddingRowwise,
    EmbeddingColwise,
    EmbeddingSlice,
    SequenceParallelNorm,
    Replicated,
    ReplicatedPartialGradient,
    PartOfSum,
    LocalParams,
    MlaKvA,
    TensorParallelExperts,
    IdentityExpert,
    SummedOutput,
    GroupedGemm,
    ExpertDispatch,
    SpreadExperts,
)
STYLES: dict[str, type[Style]] = {cls.name: cls for cls in _CLASSES}


def canonical_style(style: str) -> tuple[str, dict[str, Any]]:
    """The name and options that a plan's style string stands for. ``packed_colwise:3`` packs three pieces.

    Raises:
        PlanError: no such style; the message lists those there are.
    """
    if not isinstance(style, str):
        raise PlanError(f"A parallel style must be a string, not {style!r}.")
    aliases = {alias: cls.name for cls in STYLES.values() for alias in cls.aliases}
    name, colon, argument = style.partition(":")
    name = aliases.get(name, name)
    options = STYLES[name].written_options(argument) if name in STYLES and colon else {}
    if name not in STYLES or options is None:
        raise PlanError(f"Unknown parallel style: {style!r}. Known styles: {', '.join([*STYLES, *aliases])}.")
    return name, options


def make_style(style: str, **options: Any) -> Style:
    """The torch ``ParallelStyle`` of a style string; raises PlanError for one that does not exist."""
    name, own = canonical_style(style)
    made = STYLES[name](**own, **options)
    made.as_written = style
    return made
