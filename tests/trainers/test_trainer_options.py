"""Arguments of transformers' Trainer on sharded models: the same as on one process, or refused before a step."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import ParallelismConfig
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from trainer_runs import LENGTH, Rows, arguments, assert_same, build, on_ranks, result
from transformers import DataCollatorWithFlattening, Trainer

from shardwright import ParallelConfig
from shardwright.errors import ShardwrightError
from shardwright.verify.ranks import RankPool

Shard = Callable[[nn.Module], nn.Module]
FSDP2, TP = ParallelConfig(dp_shard=2), ParallelConfig(tp=2, sequence_parallel=True)
WAYS = {"fsdp2": FSDP2, "tp + sp": TP}


class Uneven(Dataset[dict[str, Any]]):
    """Texts of different lengths, as lists."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = Rows()[index]["input_ids"][: 3 + 5 * index % (LENGTH - 2)].tolist()
        return {"input_ids": ids}


class Stream(IterableDataset[dict[str, Tensor]]):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rows = Rows(40)
        yield from (rows[index] for index in range(len(rows)))


def padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows of one length, masked behind their ends."""
    ids = torch.zeros(len(rows), LENGTH, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
    mask = (ids > 0).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def weighted_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    """A loss of one's own, on logits."""
    logits = outputs.logits[:, :-1].float().flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    return loss / num_items_in_batch


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "label smoothing": ({"label_smoothing_factor": 0.2}, {}),
    "activation checkpointing": ({"gradient_checkpointing": True}, {}),
    "group by length": (
        {"train_sampling_strategy": "group_by_length"},
        {"train_dataset": Uneven(), "data_collator": padded},
    ),
    "stream": ({}, {"train_dataset": Stream()}),
    "packed": ({}, {"train_dataset": Uneven(), "data_collator": DataCollatorWithFlattening()}),
    "own loss": ({}, {"compute_loss_func": weighted_loss}),
    "bf16": ({"bf16": True}, {}),
}


def _train(shard: Shard, ranks: int, folder: Path, case: str) -> dict[str, Any]:
    changes, others = CASES[case]
    args = arguments(folder, ranks, **changes)
    trainer = Trainer(model=shard(build()), args=args, **{"train_dataset": Rows(), **others})
    trainer.train()
    return result(trainer)


def _all(shard: Shard, ranks: int, folder: Path) -> dict[str, dict[str, Any]]:
    return {case: _train(shard, ranks, folder, case) for case in CASES}


def test_options(ranks2: RankPool, tmp_path: Path) -> None:
    wanted = _all(lambda model: model, 1, tmp_path)
    for way, config in WAYS.items():
        for found in ranks2.run(on_ranks, _all, config, tmp_path):
            for case, result_ in wanted.items():
                print(way, case)  # shown where it fails
                assert_same(found[case], result_, 3e-2 if case == "bf16" else 1e-5)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fsdp": ({"fsdp": True}, "by Shardwright already"),
    "parallelism_config": ({"parallelism_config": "tp"}, "parallelism_config says"),
    "auto_find_batch_size": ({"auto_find_batch_size": True}, "auto_find_batch_size=True"),
    "bf16_full_eval": ({"bf16_full_eval": True}, "ParallelConfig(precision=...)"),
    "not launched": ({"use_cpu": False}, "use_cpu=True"),
    "batch_rebalance": ({"train_sampling_strategy": "batch_rebalance"}, "group_by_length"),
    "neftune": ({"neftune_noise_alpha": 5.0}, "noise"),
    "optimizer": ({"optim": "adamw_bnb_8bit"}, "adamw_torch_fused"),
}


def _refused(shard: Shard, ranks: int, folder: Path) -> dict[str, str]:
    messages = {}
    model = shard(build())
    for case, (changes, _) in REFUSED.items():
        if "parallelism_config" in changes:
            changes = {"parallelism_config": ParallelismConfig(dp_shard_size=2)}
        with pytest.raises(ShardwrightError) as caught:
            Trainer(model=model, args=arguments(folder, ranks, **changes), train_dataset=Rows()).train()
        messages[case] = str(caught.value)
        os.environ.pop("ACCELERATE_USE_FSDP", None)  # TrainingArguments(fsdp=...) leaves it
    return messages


def _late(shard: Shard, ranks: int, folder: Path) -> list[str]:
    """Trainers that do not have the sharded model from the beginning."""
    args, first = arguments(folder, ranks), build()
    made_before = Trainer(model=first, args=args, train_dataset=Rows(), eval_dataset=Rows(4))
    shard(first)
    makes_it = Trainer(model_init=lambda: shard(build()), args=args, train_dataset=Rows(), eval_dataset=Rows(4))
    messages = []
    for trainer in (made_before, makes_it):
        for call in (trainer.train, trainer.evaluate, lambda trainer=trainer: trainer.predict(Rows(4))):
            with pytest.raises(ShardwrightError) as caught:
                call()
            messages.append(str(caught.value))
    return messages


def test_a_trainer_that_gets_the_sharded_model_later_is_refused(ranks2: RankPool, tmp_path: Path) -> None:
    found = ranks2.run(on_ranks, _late, TP, tmp_path)
    assert found[0] == found[1]
    assert len(found[0]) == 6
    assert all("Call parallelize first" in message for message in found[0]), found[0]


def test_refused(ranks2: RankPool, tmp_path: Path) -> None:
    found = ranks2.run(on_ranks, _refused, TP, tmp_path)
    assert found[0] == found[1]
    for case, (_, said) in REFUSED.items():
        assert said in found[0][case], found[0][case]
