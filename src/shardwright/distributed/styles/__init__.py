"""Every tensor- and sequence-parallel behaviour as a torch ``ParallelStyle``.

:func:`make_style` turns a style name from a plan into one. To add a style: a class in the file it belongs to, a name in
``STYLES``, a test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shardwright.distributed.styles.base import Style
from shardwright.distributed.styles.embedding import EmbeddingColwise, EmbeddingRowwise, EmbeddingSlice
from shardwright.distributed.styles.experts import (
    ExpertDispatch,
    GroupedGemm,
    IdentityExpert,
    SummedOutput,
    TensorParallelExperts,
)
from shardwright.distributed.styles.key_value_heads import KeyValueHeads
from shardwright.distributed.styles.linear import Colwise, PackedColwise, PackedRowwise, Rowwise
from shardwright.distributed.styles.replicated import (
    LocalParams,
    MlaKvA,
    Replicated,
    ReplicatedPartialGradient,
    SequenceParallelNorm,
)
from shardwright.distributed.styles.written import written_options
from shardwright.errors import PlanError

STYLES: dict[str, Callable[..., Style]] = {
    "colwise": Colwise,
    "colwise_gather_output": lambda **options: Colwise(output="gather", **options),
    "colwise_logits": lambda **options: Colwise(output="logits", **options),
    "fused_qkv": lambda **options: Colwise(output="heads", **options),
    "packed_colwise": PackedColwise,
    "kv_heads": KeyValueHeads,
    "rowwise": Rowwise,
    "rowwise_split_input": lambda **options: Rowwise(split_input=True, **options),
    "packed_rowwise": PackedRowwise,
    "embedding_rowwise": EmbeddingRowwise,
    "embedding_colwise": EmbeddingColwise,
    "embedding_slice": EmbeddingSlice,
    "sequence_parallel": SequenceParallelNorm,
    "replicate": Replicated,
    "replicated_with_grad_allreduce": ReplicatedPartialGradient,
    "local_params": LocalParams,
    "mla_kv_a_proj": MlaKvA,
    "moe_tp_experts": TensorParallelExperts,
    "moe_identity_expert": IdentityExpert,
    "all_reduce": SummedOutput,
    "grouped_gemm": GroupedGemm,
    "ep_dispatch_experts": ExpertDispatch,
}
# Names that plans written for older libraries use.
ALIASES = {"colwise_rep": "colwise_gather_output", "rowwise_rep": "rowwise_split_input"}


def canonical_style(style: str) -> tuple[str, dict[str, Any]]:
    """The name and options that a plan's style string stands for. ``packed_colwise:3`` packs three pieces.

    Raises:
        PlanError: no such style; the message lists those there are.
    """
    if not isinstance(style, str):
        raise PlanError(f"A parallel style must be a string, not {style!r}.")
    name, _, argument = style.partition(":")
    name = ALIASES.get(name, name)
    options = written_options(name, argument)
    if name not in STYLES or options is None:
        raise PlanError(f"Unknown parallel style: {style!r}. Known styles: {', '.join([*STYLES, *ALIASES])}.")
    return name, options


def make_style(style: str, **options: Any) -> Style:
    """The torch ``ParallelStyle`` of a style string; raises PlanError for one that does not exist."""
    name, own = canonical_style(style)
    made = STYLES[name](**own, **options)
    made.as_written = style
    return made
