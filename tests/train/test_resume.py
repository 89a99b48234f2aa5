"""Runs that go on from a checkpoint, and what ends or refuses them, on real ranks without processes that are killed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from safetensors.torch import load_file
from test_train import make_job, train_in_rank
from torch import Tensor

from shardwright.checkpoint.manifest import verify
from shardwright.checkpoint.run_info import list_checkpoints
from shardwright.cli import main
from shardwright.errors import CheckpointError, ConfigError, RunError
from shardwright.train import checkpointing
from shardwright.train.config import JOB_CONFIG, load_config
from shardwright.train.loop import Trainer
from shardwright.train.rank import train
from shardwright.verify.ranks import RankPool, shared_mesh

FSDP2 = "sharding.dp_shard=2"
SAVING = ["steps=6", "checkpoint.every=3"]
POISONED = "model.layers.1.mlp.up_proj.weight"


def _losses(folder: Path) -> dict[int, float]:
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines}


def _checkpoint(folder: Path, step: int) -> Path:
    return folder / "run" / "checkpoints" / f"step-{step:08d}"


def _resumed(ranks: RankPool, folder: Path, checkpoint: Path, *overrides: str) -> dict[int, float]:
    """The losses after step 3 of a run that goes on from ``checkpoint``."""
    _, job = make_job(folder, ["steps=6", f"checkpoint.resume={checkpoint}", *overrides])
    ranks.run(train_in_rank, job)
    return _losses(folder)


def test_on_the_same_mesh_every_bit_is_the_same(ranks2: RankPool, tmp_path: Path) -> None:
    dropout = "model.config.attention_dropout=0.2"
    _, job = make_job(tmp_path / "whole", [FSDP2, dropout, *SAVING])
    ranks2.run(train_in_rank, job)
    resumed = _resumed(ranks2, tmp_path / "resumed", _checkpoint(tmp_path / "whole", 3), FSDP2, dropout)
    assert resumed == {step: loss for step, loss in _losses(tmp_path / "whole").items() if step > 3}
    weights = [load_file(tmp_path / name / "run" / "model" / "model.safetensors") for name in ("whole", "resumed")]
    assert all(value.equal(weights[0][name]) for name, value in weights[1].items())


@pytest.fixture(scope="module")
def whole_run(ranks2: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with a checkpoint after the third and at the end; nothing may be changed in it."""
    folder = tmp_path_factory.mktemp("whole")
    _, job = make_job(folder, [FSDP2, *SAVING])
    ranks2.run(train_in_rank, job)
    return folder


def test_on_another_mesh(ranks2: RankPool, ranks4: RankPool, tmp_path: Path, whole_run: Path) -> None:
    expected = {step: loss for step, loss in _losses(whole_run).items() if step > 3}
    middle = _checkpoint(whole_run, 3)
    four = ["sharding.tp=2", "sharding.dp_shard=2", "sharding.sequence_parallel=true", "accumulation=2"]
    assert _resumed(ranks2, tmp_path / "tp", middle, "sharding.tp=2") == pytest.approx(expected, rel=2e-5)
    assert _resumed(ranks4, tmp_path / "four", middle, *four) == pytest.approx(expected, rel=2e-5)


def test_a_checkpoint_that_is_damaged_or_beyond_the_end_is_refused(
    ranks2: RankPool, tmp_path: Path, whole_run: Path
) -> None:
    damaged = shutil.copytree(_checkpoint(whole_run, 6), tmp_path / "step-00000006")
    file = damaged / "state" / "__1_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    _, job = make_job(tmp_path / "damaged", [FSDP2, "steps=9", f"checkpoint.resume={damaged}"])
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp.*checksum"):
        ranks2.run(train_in_rank, job)
    _, job = make_job(tmp_path / "short", [FSDP2, "steps=4", f"checkpoint.resume={_checkpoint(whole_run, 6)}"])
    with pytest.raises(ConfigError, match="is of step 6, but the run has only 4 steps"):
        ranks2.run(train_in_rank, job)
    assert not list(tmp_path.glob("*/run"))


def test_export_and_inspect_on_the_command_line(tmp_path: Path, whole_run: Path) -> None:
    run, out = str(whole_run / "run"), tmp_path / "out"
    told = CliRunner().invoke(main, ["inspect", run])
    assert told.exit_code == 0, told.stderr
    assert "step-00000006" in told.stdout
    assert CliRunner().invoke(main, ["export", run, str(out)]).exit_code == 0
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (out / file).read_bytes() == (whole_run / "run" / "model" / file).read_bytes(), file
    refused = CliRunner().invoke(main, ["inspect", str(tmp_path / "nothing")])
    assert refused.exit_code == 1
    assert refused.stderr.startswith("Error: ")


@contextmanager
def _poisoned(at_step: int) -> Iterator[None]:
    """One number of one gradient is NaN at one step, on the last rank."""
    real, calls = Trainer.backward, 0

    def backward(self: Trainer, rows: Any) -> Tensor:
        nonlocal calls
        loss = real(self, rows)
        calls += 1
        if calls == at_step and dist.get_rank() == dist.get_world_size() - 1:
            gradient = self.model.get_parameter(POISONED).grad
            gradient.to_local().view(-1)[3] = float("nan")
        return loss

    Trainer.backward = backward  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer.backward = real  # type: ignore[method-assign]


def _train_poisoned(job: Path) -> None:
    with _poisoned(at_step=3):
        train_in_rank(job)


TP = "sharding.tp=2"
BOTH = {"raise": TP, "stop": FSDP2, "skip": TP}
OTHER = {"raise": FSDP2, "stop": TP, "skip": FSDP2}


@pytest.mark.parametrize("meshes", [BOTH, pytest.param(OTHER, marks=pytest.mark.sweep)], ids=["one", "other"])
def test_a_gradient_that_is_no_number(ranks2: RankPool, tmp_path: Path, meshes: dict[str, str]) -> None:
    overrides = ["steps=5", "checkpoint.every=100"]
    for policy, mesh in meshes.items():
        _, job = make_job(tmp_path / policy, [*overrides, mesh, f"not_finite={policy}"])
        if policy == "raise":
            with pytest.raises(RunError, match=f"Step 3 has .*first in the gradient of {POISONED}"):
                ranks2.run(_train_poisoned, job)
        else:
            ranks2.run(_train_poisoned, job)
    assert not (tmp_path / "raise" / "run" / "model").exists()
    assert list(_losses(tmp_path / "raise")) == list(_losses(tmp_path / "stop")) == [1, 2]
    assert list(_losses(tmp_path / "skip")) == [1, 2, 4, 5]
    assert not list_checkpoints(tmp_path / "raise" / "run" / "checkpoints")
    (saved,) = list_checkpoints(tmp_path / "stop" / "run" / "checkpoints")
    assert saved.name == "step-00000002"
    verify(saved)
    for policy in ("stop", "skip"):
        weights = load_file(tmp_path / policy / "run" / "model" / "model.safetensors")
        assert all(torch.isfinite(weight).all() for weight in weights.values())

    # What the stopped run left is the state after step 2: without the poison it goes on as if nothing had happened.
    overrides.append(meshes["stop"])
    _, job = make_job(tmp_path / "whole", overrides)
    ranks2.run(train_in_rank, job)
    _, job = make_job(tmp_path / "again", [*overrides, f"checkpoint.resume={saved}"])
    ranks2.run(train_in_rank, job)
    assert _losses(tmp_path / "again") == {step: x for step, x in _losses(tmp_path / "whole").items() if step > 2}


def _rank_1_is_another(job: Path, what: str) -> str:
    config = load_config(job / JOB_CONFIG)
    real = checkpointing._code_digest
    if dist.get_rank() == 1 and what == "config":
        config = replace(config, optimizer=replace(config.optimizer, lr=0.5))
    if dist.get_rank() == 1 and what == "code of Shardwright":
        checkpointing._code_digest = lambda: "0" * 12
    try:
        with pytest.raises(ConfigError) as caught:
            train(config, job, shared_mesh(config.sharding))
    finally:
        checkpointing._code_digest = real
    return str(caught.value)


@pytest.mark.parametrize("what", ["config", "code of Shardwright"])
def test_ranks_that_differ_are_found_before_anything_is_built(ranks2: RankPool, tmp_path: Path, what: str) -> None:
    _, job = make_job(tmp_path, [FSDP2])
    first, second = ranks2.run(_rank_1_is_another, job, what)
    assert first == second
    assert f"Rank 1 has {what}" in first
    assert not (tmp_path / "run").exists()
