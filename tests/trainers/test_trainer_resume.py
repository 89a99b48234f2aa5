"""Checkpoints of transformers' Trainer: plain folders, from which a run goes on at any mesh as if never stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from trainer_runs import Rows, accuracy, arguments, assert_same, build, on_ranks, result, state_of
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, Trainer

from shardwright import ParallelConfig
from shardwright.verify.ranks import RankPool

Shard = Callable[[nn.Module], nn.Module]
FSDP2, TP = ParallelConfig(dp_shard=2), ParallelConfig(tp=2, sequence_parallel=True)


def _trainer(shard: Shard, ranks: int, folder: Path, **changes: Any) -> Trainer:
    values = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 3, **changes}
    return Trainer(
        model=shard(build(attention_dropout=0.0)),
        args=arguments(folder, ranks, eval_strategy="steps", eval_steps=1, **values),
        train_dataset=Rows(),
        eval_dataset=Rows(10),
        compute_metrics=accuracy,
    )


def _train(shard: Shard, ranks: int, folder: Path, resume: str | None = None) -> dict[str, Any]:
    trainer = _trainer(shard, ranks, folder)
    trainer.train(resume_from_checkpoint=None if resume is None else str(folder / resume))
    return result(trainer)


def _best(shard: Shard, ranks: int, folder: Path) -> dict[str, Any]:
    """Early stopping, the best model at the end, and predictions with it."""
    trainer = _trainer(
        shard, ranks, folder, max_steps=6, learning_rate=0.3, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=False,
    )  # fmt: skip
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=1))
    trainer.train()
    found = trainer.predict(Rows(10))
    return {
        **result(trainer),
        "stopped": trainer.state.global_step,
        "best": trainer.state.best_global_step,
        "predictions": torch.from_numpy(found.predictions),
        "metrics": found.metrics["test_loss"],
    }


def test_resumed_at_any_mesh(ranks2: RankPool, tmp_path: Path) -> None:
    wanted = _train(lambda model: model, 1, tmp_path / "one")
    for name, config, other in (("fsdp2", FSDP2, TP), ("tp", TP, FSDP2)):
        folder = tmp_path / name
        assert_same(ranks2.run(on_ranks, _train, config, folder)[0], wanted)
        kept = sorted(each.name for each in folder.glob("checkpoint-*"))
        assert kept == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
        plain = AutoModelForCausalLM.from_pretrained(folder / "checkpoint-4")
        for key, value in state_of(plain).items():
            assert torch.allclose(value, wanted["state"][key], atol=1e-4), key
        for again in (config, other):
            assert_same(ranks2.run(on_ranks, _train, again, folder, "checkpoint-2")[0], wanted)


def test_best_model_and_predictions(ranks2: RankPool, tmp_path: Path) -> None:
    wanted = _best(lambda model: model, 1, tmp_path / "one")
    assert wanted["best"] < wanted["stopped"]
    for found in ranks2.run(on_ranks, _best, FSDP2, tmp_path / "fsdp2"):
        assert_same(found, wanted, 1e-4)
        assert (found["stopped"], found["best"]) == (wanted["stopped"], wanted["best"])
        assert torch.allclose(found["predictions"], wanted["predictions"], atol=1e-3)
        assert abs(found["metrics"] - wanted["metrics"]) < 1e-4
