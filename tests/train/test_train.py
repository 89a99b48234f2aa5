"""Whole runs on real ranks against a plain training loop in one process, written here without Shardwright's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from shardwright.errors import ParityError, RunError, ShardwrightError
from shardwright.train.config import JOB_CONFIG, TrainConfig, load_config
from shardwright.train.dataset import IGNORE, Order, TokenRows
from shardwright.train.model import build_whole_model, model_config
from shardwright.train.prepare import TOKENIZER, prepare
from shardwright.train.rank import train
from shardwright.train.schedule import rate
from shardwright.train.tokenizer import load_tokenizer
from shardwright.verify.ranks import RankPool, shared_mesh

STEPS = 4
BASE = {
    "model": {
        "config": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
        }
    },
    "tokenizer": {"vocab_size": 301},  # no mesh divides it
    "data": {"paths": ["stdlib:json"], "include": ["*.py"], "sequence_length": 24, "validation": 5},
    "optimizer": {"lr": 1e-2},
    "schedule": {"warmup_steps": 1},
    "steps": STEPS,
    "batch_size": 8,
    "clip_norm": 0.5,  # below every gradient norm of the run, so clipping acts
    "seed": 3,
    "device": "cpu",
    "output": {"validate_every": 2, "tensorboard": False},
}
SEPARATE = ["data.pack=false", "data.paths=stdlib:json/__init__.py"]


def make_job(folder: Path, overrides: list[str]) -> tuple[TrainConfig, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(BASE))  # JSON is YAML
    config = load_config(folder / "run.json", [f"output.dir={folder / 'run'}", *overrides])
    job = folder / "job"
    job.mkdir()
    prepare(config, job, lambda text: None)
    return config, job


def train_in_rank(job: Path) -> None:
    config = load_config(job / JOB_CONFIG)
    train(config, job, shared_mesh(config.sharding))


def plain_run(config: TrainConfig, job: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Loss, gradient norm and validation loss of every step, and the weights at the end."""
    architecture = model_config(config.model, load_tokenizer(str(job / TOKENIZER)))
    model = build_whole_model(config, architecture)
    data = TokenRows(job)
    order = Order(len(data), config.batch_size, config.data.validation, config.seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    lines = []
    for step in range(STEPS):
        loss = mean_loss(model, data, order.rows(step))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * rate(step, STEPS, 1, 0.1)
        optimizer.step()
        optimizer.zero_grad()
        lines.append({"loss": loss.item(), "grad_norm": norm.item()})
        if step % 2:
            lines[-1]["validation_loss"] = mean_loss(model, data, order.held_out).item()
    return lines, {name: p.detach() for name, p in model.named_parameters()}


def mean_loss(model: Any, data: TokenRows, rows: Any) -> torch.Tensor:
    batch = data.batch(rows)
    logits = model(input_ids=batch.input_ids).logits
    return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE)


def check_run(ranks: RankPool, tmp_path: Path, overrides: list[str]) -> Path:
    """Run it, compare every number and every weight with the plain run; returns the saved model's folder."""
    config, job = make_job(tmp_path, overrides)
    expected, weights = plain_run(config, job)
    ranks.run(train_in_rank, job)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["tokens"] == STEPS * 8 * 24
    for line, wanted in zip(lines, expected, strict=True):
        assert {key: line[key] for key in ("loss", "grad_norm", "validation_loss") if key in line} == pytest.approx(
            wanted, rel=2e-5
        )
    saved = tmp_path / "run" / "model"
    model = AutoModelForCausalLM.from_pretrained(saved)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), weights[name], rtol=1e-4, atol=1e-4)
    return saved


FSDP2, TP = "sharding.dp_shard=2", "sharding.tp=2"
CP = ["sharding.cp=2", "sharding.context_method=auto", "accumulation=2", "check_first_step=true"]
SEQUENCES = [TP, "sharding.sequence_parallel=true", "accumulation=4"]
TWO = [
    [FSDP2],
    [FSDP2, "accumulation=2", "check_first_step=true", *SEPARATE],
    [TP, *SEPARATE],
    SEQUENCES,
    CP,
    [*CP, *SEPARATE],
    pytest.param([FSDP2, *SEPARATE], marks=pytest.mark.sweep),
    pytest.param([TP], marks=pytest.mark.sweep),
    pytest.param([*SEQUENCES, *SEPARATE], marks=pytest.mark.sweep),
]


@pytest.mark.parametrize("run", TWO, ids=" ".join)
def test_two_ranks_train_as_one_process(ranks2: RankPool, tmp_path: Path, run: list[str]) -> None:
    check_run(ranks2, tmp_path, run)


@pytest.mark.parametrize(
    "mesh",
    [
        ["sharding.dp_replicate=2", FSDP2, "accumulation=2"],
        [
            TP,
            FSDP2,
            "sharding.sequence_parallel=true",
            "sharding.loss_tiles=4",
            "sharding.mlp_tiles=2",
            "sharding.activation_checkpointing=full",
            "sharding.offload_activations=true",
            "check_first_step=true",
        ],
    ],
    ids=" ".join,
)
def test_four_ranks_train_as_one_process(ranks4: RankPool, tmp_path: Path, mesh: list[str]) -> None:
    saved = check_run(ranks4, tmp_path, [*mesh, *SEPARATE])
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert tokenizer.decode(tokenizer("import json")["input_ids"]) == "import json"
    config = json.loads((saved / "config.json").read_text())
    assert (config["architectures"], config["tie_word_embeddings"]) == (["LlamaForCausalLM"], True)
    assert not list(saved.parent.glob(".*"))  # nothing unfinished is left


def test_training_goes_on_from_a_checkpoint(ranks2: RankPool, tmp_path: Path) -> None:
    saved = check_run(ranks2, tmp_path / "first", ["sharding.dp_shard=2"])
    again = [f"model.path={saved}", "model.config=null", "tokenizer.vocab_size=null", "sharding.tp=2"]
    check_run(ranks2, tmp_path / "second", again)


def refuse(ranks: RankPool, job: Path) -> str:
    with pytest.raises(ShardwrightError) as error:
        ranks.run(train_in_rank, job)
    return str(error.value)


def test_a_first_step_that_differs_stops_the_run(ranks2: RankPool, tmp_path: Path) -> None:
    dropout = ["model.config.attention_dropout=0.5", "check_first_step=true", "sharding.dp_shard=2"]
    _, job = make_job(tmp_path, dropout)
    with pytest.raises(ParityError, match="The first step differs from one process by more than 1e-05: loss"):
        ranks2.run(train_in_rank, job)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_stops_the_run(ranks2: RankPool, tmp_path: Path) -> None:
    _, job = make_job(tmp_path, ["optimizer.lr=1e30", "sharding.dp_shard=2"])
    with pytest.raises(RunError, match=r"has loss .* Lower optimizer\.lr"):
        ranks2.run(train_in_rank, job)
    assert not (tmp_path / "run" / "model").exists()


def test_heads_that_do_not_divide_are_refused_before_anything_is_written(ranks4: RankPool, tmp_path: Path) -> None:
    _, job = make_job(tmp_path, ["sharding.tp=4", "model.config.num_attention_heads=2", "model.config.head_dim=16"])
    message = refuse(ranks4, job)
    assert "2" in message
    assert "4" in message
    assert not (tmp_path / "run").exists()
