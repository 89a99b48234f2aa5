"""transformers' Trainer on sharded models: every step is that of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from trainer_runs import Rows, accuracy, arguments, assert_same, build, on_ranks, result
from transformers import Trainer

from shardwright import ParallelConfig
from shardwright.verify.ranks import RankPool

TP = ParallelConfig(tp=2)
TWO = {"fsdp2": ParallelConfig(dp_shard=2), "tp + sp": TP.with_(sequence_parallel=True)}
FOUR = {
    "tp + sp x fsdp2": ParallelConfig(tp=2, dp_shard=2, sequence_parallel=True),
    "hsdp": ParallelConfig(dp_shard=2, dp_replicate=2),
}
Shard = Callable[[nn.Module], nn.Module]


def _train(shard: Shard, ranks: int, folder: Path, **changes: Any) -> dict[str, Any]:
    """A script as people write it."""
    trainer = Trainer(
        model=shard(build()),
        args=arguments(folder, ranks, eval_strategy="steps", eval_steps=2, **changes),
        train_dataset=Rows(),
        eval_dataset=Rows(10),
        compute_metrics=accuracy,
    )
    trainer.train()
    return result(trainer)


def _same(pool: RankPool, config: ParallelConfig, folder: Path) -> None:
    wanted = _train(lambda model: model, 1, folder)
    for found in pool.run(on_ranks, _train, config, folder):
        assert_same(found, wanted)


@pytest.mark.parametrize("config", list(TWO.values()), ids=list(TWO))
def test_two_ranks(ranks2: RankPool, config: ParallelConfig, tmp_path: Path) -> None:
    _same(ranks2, config, tmp_path)


@pytest.mark.parametrize("config", list(FOUR.values()), ids=list(FOUR))
def test_four_ranks(ranks4: RankPool, config: ParallelConfig, tmp_path: Path) -> None:
    _same(ranks4, config, tmp_path)
