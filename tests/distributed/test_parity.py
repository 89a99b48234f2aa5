"""One training step of every family on real ranks equals one process: the heart of the project.

Each case: two accumulated micro-batches, other data on every data-parallel rank, plain ``loss.backward()``, stock
``torch.nn.utils.clip_grad_norm_``, one AdamW step. Loss, logits, every gradient, the norm and every updated parameter
are compared to a relative 1e-5 by :func:`shardwright.verify.run.run_case`. Its optimizer has a large epsilon (1e-2 next
to gradients of that size after clipping), because AdamW's first step is ``g / (|g| + eps)``: with torch's 1e-8 the
rounding of a gradient that is zero in exact arithmetic (a key bias under softmax) would become a step of full length.

Whether embeddings are tied and whether the model starts on meta alternates over the table, so that every family meets
all four, and every layout too, without four times the cases.
"""

from __future__ import annotations

import pytest
from tiny_models import EXPECTED_SHARE, FAMILIES, assert_exact, measure

from shardwright import ParallelConfig
from shardwright.verify.ranks import RankPool

ON_TWO = {
    "tp2": ParallelConfig(tp=2),
    "tp2+sp": ParallelConfig(tp=2, sequence_parallel=True),
    "fsdp2": ParallelConfig(dp_shard=2),
}
ON_FOUR = {
    "tp2 x fsdp2": ParallelConfig(tp=2, dp_shard=2),
    "tp2+sp x fsdp2": ParallelConfig(tp=2, dp_shard=2, sequence_parallel=True),
    "hsdp 2x2": ParallelConfig(dp_replicate=2, dp_shard=2),
}
CHECKPOINTING = ("none", "full", "selective")


def _table(layouts: dict[str, ParallelConfig]) -> list[object]:
    cases = []
    for row, family in enumerate(FAMILIES):
        for column, (name, config) in enumerate(layouts.items()):
            for turn, checkpointing in enumerate(("none", "full")):
                tied, meta = bool((row + column + turn) % 2), bool((row // 2 + column // 2 + turn) % 2)
                mode = "selective" if checkpointing == "full" and (row + column) % 3 == 0 else checkpointing
                label = f"{family}-{name}-{mode}-{'tied' if tied else 'untied'}-{'meta' if meta else 'device'}"
                changed = config.with_(activation_checkpointing=mode)
                cases.append(pytest.param(family, changed, tied, meta, id=label))
    return cases


@pytest.mark.parametrize(("family", "config", "tied", "meta"), _table(ON_TWO))
def test_two_ranks(ranks2: RankPool, family: str, config: ParallelConfig, tied: bool, meta: bool) -> None:
    report = measure(ranks2, family, config, meta=meta, tie_word_embeddings=tied)
    assert_exact(report, EXPECTED_SHARE if config.tp > 1 else 0.0)


@pytest.mark.parametrize(("family", "config", "tied", "meta"), _table(ON_FOUR))
def test_four_ranks(ranks4: RankPool, family: str, config: ParallelConfig, tied: bool, meta: bool) -> None:
    report = measure(ranks4, family, config, meta=meta, tie_word_embeddings=tied)
    assert_exact(report, EXPECTED_SHARE if config.tp > 1 else 0.0)
