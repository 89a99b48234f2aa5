"""transformers' Trainer where sequences, or experts, are spread over ranks: as on one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trainer_runs import Rows, accuracy, arguments, assert_same, build, on_ranks, result
from transformers import Trainer

from shardwright import ParallelConfig
from shardwright.verify.ranks import RankPool

Shard = Callable[[nn.Module], nn.Module]
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
AXES: dict[str, tuple[ParallelConfig, str, dict[str, Any]]] = {
    "cp": (ParallelConfig(cp=2), "llama", {}),
    "ep": (ParallelConfig(dp_shard=2, ep=2), "mixtral", MIXTRAL),
}


def _train(shard: Shard, ranks: int, folder: Path, family: str, changes: dict[str, Any], resume: bool) -> Any:
    """Train, measure after every other step, take the best weights at the end, and predict."""
    args = arguments(
        folder, ranks, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", train_sampling_strategy="group_by_length",
    )  # fmt: skip
    trainer = Trainer(
        model=shard(build(family, **changes)),
        args=args,
        train_dataset=Rows(),
        eval_dataset=Rows(7),
        compute_metrics=accuracy,
    )
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    predicted = trainer.predict(Rows(7))
    return {**result(trainer), "logits": torch.as_tensor(predicted.predictions), "measured": predicted.metrics}


@pytest.mark.parametrize("axis", AXES)
def test_trained_measured_resumed_and_predicted(ranks2: RankPool, axis: str, tmp_path: Path) -> None:
    config, family, changes = AXES[axis]
    wanted = _train(lambda model: model, 1, tmp_path / "one", family, changes, False)
    for resume in (False, True):
        found = ranks2.run(on_ranks, _train, config, tmp_path / "two", family, changes, resume)[0]
        assert_same(found, wanted)
        assert torch.allclose(found["logits"], wanted["logits"], atol=1e-4)
        assert abs(found["measured"]["test_loss"] - wanted["measured"]["test_loss"]) < 1e-5
        assert found["measured"]["test_accuracy"] == wanted["measured"]["test_accuracy"]
