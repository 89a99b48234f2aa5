"""Fine-tuning on conversations over two ranks against a plain loop in one process that sees one example at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from chats import TEMPLATE, UNMARKED, conversations, model_folder, write_lines
from peft import PeftModel
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from shardwright.checkpoint.export import export, inspect
from shardwright.checkpoint.run_info import find_checkpoint
from shardwright.checkpoint.storage import SafeReader
from shardwright.distributed.config import ParallelConfig
from shardwright.errors import CheckpointError, ConfigError
from shardwright.train.config import JOB_CONFIG, TrainConfig, read_config
from shardwright.train.dataset import IGNORE, Order, TokenRows
from shardwright.train.model import build_whole_model
from shardwright.train.prepare import VALIDATION, prepare
from shardwright.train.rank import train
from shardwright.train.schedule import rate
from shardwright.verify.ranks import RankPool, shared_mesh

LR, CLIP = 1e-2, 0.5


def make_job(folder: Path, data: dict[str, Any], *overrides: str, template: str = TEMPLATE) -> Path:
    """A run on data of which the examples have different numbers of tokens to train on, and its filled job folder."""
    folder.mkdir(parents=True, exist_ok=True)
    run = {
        "model": {"path": str(model_folder(folder / "base", template=template))},
        "data": {"sequence_length": 48, "validation_paths": data["paths"], **data},
        "optimizer": {"lr": LR},
        "batch_size": 4,
        "accumulation": 2,
        "epochs": 1.0,
        "clip_norm": CLIP,
        "device": "cpu",
        "output": {"dir": str(folder / "run"), "tensorboard": False},
    }
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "job").mkdir()
    prepare(read_config(folder / "run.json", overrides), folder / "job", lambda text: None)
    return folder / "job"


def train_in_rank(job: Path) -> None:
    config = read_config(job / JOB_CONFIG)
    train(config, job, shared_mesh(config.sharding))


def alone(data: TokenRows, rows: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and labels of every example in ``rows``, by itself, ``[1, tokens]``."""
    batch = data.batch(rows)
    for row in range(len(rows)):
        places = torch.arange(48) if batch.position_ids is None else batch.position_ids[row]
        starts = [*torch.nonzero(places == 0).flatten().tolist(), 48]
        for start, end in pairwise(starts):
            yield batch.input_ids[row : row + 1, start:end], batch.labels[row : row + 1, start:end]


def mean_loss(model: Any, data: TokenRows, rows: np.ndarray) -> Tensor:
    losses, count = [], 0
    for ids, labels in alone(data, rows):
        logits = model(input_ids=ids).logits
        losses.append(F.cross_entropy(logits[0], labels[0], ignore_index=IGNORE, reduction="sum"))
        count += int((labels != IGNORE).sum())
    return torch.stack(losses).sum() / count


Parameters = list[torch.nn.Parameter]


def adamw(matrices: Parameters, vectors: Parameters, steps: int) -> tuple[Optimizer, LambdaLR]:
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    made = torch.optim.AdamW([group for group in groups if group["params"]], lr=LR, betas=(0.9, 0.95))
    return made, LambdaLR(made, lambda step: rate(step, steps, 0, 0.1))


def sgd(matrices: Parameters, vectors: Parameters, steps: int) -> tuple[Optimizer, LambdaLR]:
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    made = torch.optim.SGD(groups, lr=LR, momentum=0.9)
    return made, get_wsd_schedule(made, 1, 2, num_training_steps=steps)


def muon(matrices: Parameters, vectors: Parameters, steps: int) -> tuple[Optimizer, LambdaLR]:
    assert not vectors
    made = torch.optim.Muon(matrices, lr=LR, weight_decay=0.1)
    return made, get_linear_schedule_with_warmup(made, 1, steps)


def plain_run(config: TrainConfig, job: Path, make: Any = adamw) -> tuple[list[float], float, dict[str, Tensor]]:
    """The loss of every step, the validation loss at the end, and the weights."""
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32).train()
    if config.lora.r:
        model = PeftModel.from_pretrained(model, job / "adapter", is_trainable=True)
    data, held = TokenRows(job), TokenRows(job / VALIDATION)
    order = Order(len(data), config.batch_size, 0, config.seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, schedule = make([p for p in trained if p.ndim > 1], [p for p in trained if p.ndim == 1], config.steps)
    losses = []
    for step in range(config.steps):
        loss = mean_loss(model, data, order.rows(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    validation = mean_loss(model, held, np.arange(len(held))).item()
    return losses, validation, {name: p.detach() for name, p in model.named_parameters()}


def check_run(ranks: RankPool, job: Path, make: Any = adamw) -> Path:
    """Train on the ranks and compare; returns the folder of the saved model."""
    config = read_config(job / JOB_CONFIG)
    losses, validation, weights = plain_run(config, job, make)
    assert len(losses) > 2
    ranks.run(train_in_rank, job)
    output = Path(config.output.dir)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=2e-5)
    assert lines[-1]["validation_loss"] == pytest.approx(validation, rel=2e-5)
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), weights[name], rtol=1e-4, atol=1e-4)
    return output / "model"


@pytest.mark.parametrize(
    "mesh",
    [
        ["sharding.dp_shard=2", "check_first_step=true"],
        ["sharding.tp=2", "sharding.sequence_parallel=true", "sharding.activation_checkpointing=full"],
        ["sharding.cp=2"],
        ["sharding.dp_shard=2", "data.pack=false"],
    ],
    ids=" ".join,
)
def test_conversations_train_as_in_one_process(ranks2: RankPool, tmp_path: Path, mesh: list[str]) -> None:
    lines = write_lines(tmp_path / "talks.jsonl", conversations(36))
    saved = check_run(ranks2, make_job(tmp_path, {"paths": str(lines), "format": "chat"}, *mesh))
    assert "generation" in AutoTokenizer.from_pretrained(saved).chat_template


def test_prompts_and_completions(ranks2: RankPool, tmp_path: Path) -> None:
    pairs = [{"prompt": f"{n} plus {n % 5} is", "completion": f" {n + n % 5}"} for n in range(40)]
    data = {"paths": str(write_lines(tmp_path / "pairs.jsonl", pairs)), "format": "prompt_completion"}
    check_run(ranks2, make_job(tmp_path, data, "sharding.tp=2", template=UNMARKED))


def first_values(job: Path) -> None:
    """Leave what the adapters begin with as a folder of PEFT's, from the model of a run in one piece.

    They are LoRA's by PEFT: the second factor is zero, the first is not, and no two layers have the same.
    """
    config = read_config(job / JOB_CONFIG)
    model: Any = build_whole_model(config, AutoConfig.from_pretrained(str(config.model.path)))
    factors = [p for name, p in model.named_parameters() if "lora_A" in name]
    assert len({float(p.sum()) for p in factors}) == len(factors) == 14
    bound = 3**0.5 / 32**0.5  # kaiming_uniform_(a=sqrt(5)) of 32 features: sqrt(3 / features) * sqrt(1 / 3)
    assert all(0 < p.abs().max() <= bound for p in factors)
    assert all(not p.any() for name, p in model.named_parameters() if "lora_B" in name)
    model.save_pretrained(job / "adapter")


def check_adapters_run(ranks: RankPool, job: Path, make: Any, loss: float = 2e-5, weight: float = 1e-5) -> None:
    """Train adapters on the ranks; then go on from the checkpoint before the last, and write the same again."""
    first_values(job)
    config = read_config(job / JOB_CONFIG)
    losses, validation, weights = plain_run(config, job, make)
    output = Path(config.output.dir)
    for resume in (False, True):
        if resume:
            shutil.rmtree(output / "checkpoints" / f"step-{config.steps:08d}")
            shutil.rmtree(output / "model")
            again = replace(config, checkpoint=replace(config.checkpoint, resume=True), check_first_step=False)
            (job / JOB_CONFIG).write_text(replace(again, sharding=ParallelConfig(dp_shard=2)).to_yaml())
        ranks.run(train_in_rank, job)
        found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        assert [line["loss"] for line in found] == pytest.approx(losses, rel=loss)
        assert found[-1]["validation_loss"] == pytest.approx(validation, rel=loss)
        saved = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.model.path), output / "model")
        assert saved.peft_config["default"].base_model_name_or_path == config.model.path
        for name, parameter in saved.named_parameters():
            torch.testing.assert_close(parameter.detach(), weights[name], rtol=1e-4, atol=weight)


LORA = ["lora.r=4", "lora.alpha=32", "check_first_step=true"]


DORA = ["lora.dora=true", "lora.rank_stabilised=true", "lora.modules_to_save=[lm_head]"]


@pytest.mark.parametrize(
    "run", [["sharding.dp_shard=2"], ["sharding.tp=2", "sharding.sequence_parallel=true", *DORA]], ids=" ".join
)
def test_adapters_train_as_plain_peft_does_and_go_on(ranks2: RankPool, tmp_path: Path, run: list[str]) -> None:
    lines = write_lines(tmp_path / "talks.jsonl", conversations(36))
    job = make_job(tmp_path, {"paths": str(lines), "format": "chat"}, *LORA, *run, "checkpoint.every=1")
    check_adapters_run(ranks2, job, adamw)
    output = Path(read_config(job / JOB_CONFIG).output.dir)
    newest = find_checkpoint(output)
    kept = SafeReader(newest / "state").read_metadata().state_dict_metadata
    trained = 28 + (15 if "lora.dora=true" in run else 0)  # 14 magnitudes, and the head
    assert len(kept) == 4 * trained  # values and AdamW's state, and no base model
    assert all("lora_" in name or "modules_to_save" in name for name in kept)
    assert inspect(newest).model_type == "adapters, LORA"
    with pytest.raises(CheckpointError, match="holds an adapter alone"):
        export(output, tmp_path / "exported")


def test_adapters_on_layers_that_are_not_there(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "talks.jsonl", conversations(4))
    with pytest.raises(ConfigError, match=r"PEFT cannot put adapters on LlamaForCausalLM: .*query"):
        make_job(tmp_path, {"paths": str(lines), "format": "chat"}, "lora.r=4", "lora.target_modules=query")


def test_another_optimizer_and_schedule(ranks2: RankPool, tmp_path: Path) -> None:
    data = {"paths": str(write_lines(tmp_path / "talks.jsonl", conversations(36))), "format": "chat"}
    schedule = ["schedule.name=warmup_stable_decay", "schedule.options={num_decay_steps: 2}", "schedule.warmup_steps=1"]
    optimizer = ["optimizer.name=sgd", "optimizer.options={momentum: 0.9}"]
    check_run(ranks2, make_job(tmp_path, data, *schedule, *optimizer, "sharding.tp=2"), sgd)


def test_muon_on_adapters_goes_on(ranks2: RankPool, tmp_path: Path) -> None:
    """Muon computes its updates in bfloat16, whose rounding other last bits of the gradients change."""
    data = {"paths": str(write_lines(tmp_path / "talks.jsonl", conversations(36))), "format": "chat"}
    chosen = [
        "optimizer.name=torch.optim.Muon",
        "schedule.name=linear",
        "schedule.warmup_steps=1",
        "checkpoint.every=1",
    ]
    check_adapters_run(ranks2, make_job(tmp_path, data, *chosen, "lora.r=4", "sharding.tp=2"), muon, 1e-3, 5e-3)
