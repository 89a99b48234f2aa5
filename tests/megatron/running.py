"""Whole training runs with either engine, on the ranks."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from training import device_type, environment

from shardwright.distributed.config import Degrees
from shardwright.distributed.mesh import make_mesh
from shardwright.train.config import JOB_CONFIG, load_config
from shardwright.train.prepare import prepare
from shardwright.train.rank import train

BASE = {
    "model": {
        "config": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
        }
    },
    "tokenizer": {"vocab_size": 301},  # no mesh divides it
    "data": {"paths": ["stdlib:json"], "include": ["*.py"], "sequence_length": 24, "validation": 5},
    "optimizer": {"lr": 1e-2, "eps": 1e-4},  # an eps that does not magnify the rounding of gradients near zero
    "schedule": {"warmup_steps": 1},
    "steps": 4,
    "batch_size": 8,
    "accumulation": 2,
    "clip_norm": 0.5,  # below every gradient norm of the run, so clipping acts
    "seed": 3,
    "output": {"validate_every": 2, "tensorboard": False},
}


def make_job(folder: Path, overrides: list[str]) -> Path:
    """A job folder whose run writes to ``folder/run``."""
    folder.mkdir(parents=True)
    (folder / "base.json").write_text(json.dumps(BASE))  # JSON is YAML
    config = load_config(folder / "base.json", [f"output.dir={folder / 'run'}", *overrides])
    job = folder / "job"
    job.mkdir()
    prepare(config, job, lambda text: None)
    return job


@cache
def mesh_of(degrees: Degrees, device: str) -> DeviceMesh:
    return make_mesh(degrees, device)


def run_job(job: Path) -> None:
    config = load_config(job / JOB_CONFIG)
    with environment():
        train(config, job, mesh_of(config.sharding.degrees(dist.get_world_size()), device_type()))


def metrics(folder: Path) -> list[dict[str, Any]]:
    """What a run has recorded, without the times."""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: line[key] for key in ("step", "loss", "grad_norm", "validation_loss") if key in line} for line in lines
    ]


def weights(model: Path) -> dict[str, Tensor]:
    return load_file(model / "model.safetensors")


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference relative to the norm of a weight."""
    assert list(a) == list(b)
    return max(float((a[name] - b[name]).norm() / b[name].norm()) for name in a)
