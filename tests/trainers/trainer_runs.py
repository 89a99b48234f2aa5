"""Trainers on one process and on ranks, and what they are compared by; picklable by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import EvalPrediction

from shardwright import ParallelConfig, parallelize
from shardwright.distributed.runtime.layout import whole
from shardwright.verify.ranks import shared_mesh
from shardwright.verify.tiny import randomize

VOCABULARY = 61  # odd, so that no tensor-parallel size divides it
ROWS, LENGTH = 24, 12
BATCH = 4  # examples of a micro-batch, over all ranks
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def build(family: str = "llama", **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model)
    return model.train()


class Rows(Dataset[dict[str, Tensor]]):
    """Texts of one length, of which a different part is trained on in each."""

    def __init__(self, rows: int = ROWS) -> None:
        generator = torch.Generator().manual_seed(7)
        self._ids = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self._ids[index]
        labels = ids.clone()
        labels[: 1 + index % 7] = -100
        return {"input_ids": ids, "labels": labels}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    guesses = numpy.argmax(prediction.predictions, axis=-1)[:, :-1]
    labels = prediction.label_ids[:, 1:]
    return {"accuracy": float((guesses == labels)[labels != -100].mean()), "rows": float(len(labels))}


@contextmanager
def started() -> Iterator[None]:
    """Inside, a rank of a pool looks to accelerate like one that torchrun has started."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    _forget()
    try:
        yield
    finally:
        _forget()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    assert not PartialState._shared_state


def arguments(folder: Path, ranks: int = 1, cls: type[Any] = TrainingArguments, **changes: Any) -> Any:
    """Arguments for a run whose batches are ``BATCH`` examples over ``ranks`` data-parallel ranks."""
    values: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "per_device_train_batch_size": BATCH // ranks,
        "per_device_eval_batch_size": BATCH // ranks, "gradient_accumulation_steps": 2, "max_steps": 4,
        "learning_rate": 1e-2, "max_grad_norm": 0.5, "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "disable_tqdm": True, "seed": 3, "weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 1,
    }  # fmt: skip
    return cls(**{**values, **changes})


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(value.detach()).clone() for name, value in model.state_dict().items()}


def result(trainer: Trainer) -> dict[str, Any]:
    """What one run is compared with another by."""
    kept = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_accuracy", "eval_rows")
    history = [{key: line[key] for key in kept if key in line} for line in trainer.state.log_history]
    return {"history": [line for line in history if line], "state": state_of(trainer.model)}


def data_ranks(config: ParallelConfig) -> int:
    return max(config.dp_shard, 1) * config.dp_replicate


def on_ranks(run: Callable[..., dict[str, Any]], config: ParallelConfig, *args: Any, **kwargs: Any) -> Any:
    """``run(shard, ranks, ...)`` on every rank, with ``shard`` a function that parallelizes a model."""
    torch.manual_seed(100 + dist.get_rank())
    mesh = shared_mesh(config)
    with started():
        return run(lambda model: parallelize(model, config, mesh), data_ranks(config), *args, **kwargs)


def assert_same(found: dict[str, Any], wanted: dict[str, Any], tolerance: float = 1e-5) -> None:
    assert len(found["history"]) == len(wanted["history"])
    for ours, theirs in zip(found["history"], wanted["history"], strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert abs(ours[key] - value) <= tolerance * max(abs(value), 1e-3), (key, ours, theirs)
    assert found["state"].keys() == wanted["state"].keys()
    for name, value in wanted["state"].items():
        error = (found["state"][name] - value).norm() / value.norm()
        assert error <= 10 * tolerance, (name, float(error))
