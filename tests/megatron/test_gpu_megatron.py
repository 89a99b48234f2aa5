"""The same functions on NCCL: as many ranks as there are GPUs, one will do. Run with ``make test-gpu``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import running
import state
import torch
from training import Case, compare, gradients

import shardwright
from shardwright.distributed.apply.megatron_fsdp.availability import installed
from shardwright.verify.ranks import RankPool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")
GPUS = torch.cuda.device_count()
TENSOR_PARALLEL = (1, 2) if GPUS and GPUS % 2 == 0 else (1,)
QUICKSTART = Path(shardwright.__file__).parent / "demo" / "quickstart.yaml"
ENGINE = "sharding.engine=megatron_fsdp"


@pytest.mark.parametrize("tp", TENSOR_PARALLEL)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("options", "case"),
    [
        ({}, {"public": True}),
        ({}, {"optimizer": "bare", "accumulation": 2, "clip": 0.5, "set_to_none": False}),
        ({}, {"optimizer": "attached", "accumulation": 2, "tied": True, "frozen": True, "inner": True}),
        ({}, {"checkpointing": "full"}),
        ({"overlap_grad_reduce": False, "overlap_param_gather": False}, {"accumulation": 2}),
        ({"grad_reduce_in_fp32": True, "preserve_fp32_weights": True}, {}),
        ({"average_in_collective": True}, {"accumulation": 2}),
        ({"calculate_per_token_loss": True}, {"accumulation": 2, "summed": True}),
        ({"disable_bucketing": True}, {"optimizer": "bare"}),
    ],
    ids=str,
)
def test_steps(gpus: RankPool, options: dict[str, Any], case: dict[str, Any], strategy: str, tp: int) -> None:
    every = {**options, "data_parallel_sharding_strategy": strategy}
    for difference in gpus.run(compare, Case(every, tp=tp, **case)):
        assert difference.seen < 1e-5
        assert difference.parameters < 5e-5
        assert difference.moved > 1e-3


@pytest.mark.skipif(installed() < (0, 6), reason="refused with megatron-fsdp 0.5")
def test_double_buffers(gpus: RankPool) -> None:
    assert (
        max(found.parameters for found in gpus.run(compare, Case({"fsdp_double_buffer": True}, accumulation=2))) < 5e-5
    )
    assert max(gpus.run(state.two_models_at_once)) < 1e-5


@pytest.mark.parametrize("tp", TENSOR_PARALLEL)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients(gpus: RankPool, strategy: str, tp: int) -> None:
    assert max(gpus.run(gradients, strategy, tp, "ours")) < 1e-5


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_between_steps(gpus: RankPool, strategy: str) -> None:
    assert max(gpus.run(state.evaluation_sees_new_weights, strategy)) < 1e-5
    assert max(gpus.run(state.two_forwards_then_two_backwards, strategy)) < 1e-5
    for found in gpus.run(state.parameters_that_take_no_part, strategy, True):
        assert found["missing"] == ["never.weight", "never.bias"]
        assert found["weights"] < 1e-4


def test_optimizers(gpus: RankPool) -> None:
    assert max(gpus.run(state.momentum_with_dampening)) < 1e-5
    for found in gpus.run(state.attaching_changes_nothing):
        assert found == {"groups": True, "same_parameters": True, "weights": 0.0, "gradients": 0.0, "state": 0}


def test_a_gradient_that_is_no_number(gpus: RankPool) -> None:
    assert all("21 of 21 parameters" in message for message in gpus.run(state.not_a_number, True))


@pytest.mark.parametrize("tp", TENSOR_PARALLEL)
def test_checkpoint(gpus: RankPool, tmp_path: Path, tp: int) -> None:
    expected = gpus.run(state.train_and_save, str(tmp_path), 1)[0]
    found = gpus.run(state.load_and_train, str(tmp_path), tp, "optim_grads_params")[0]
    assert state.differences(found, expected) < 1e-5


@pytest.mark.parametrize("tp", TENSOR_PARALLEL)
def test_meta_device(gpus: RankPool, tp: int) -> None:
    for found in gpus.run(state.from_meta, tp, "optim_grads_params", tp == 2):
        assert found["logits"] < 1e-5
        assert found["ranks"] == 0.0
        assert 0.015 < found["std"] < 0.025


def test_bfloat16(gpus: RankPool) -> None:
    for found in gpus.run(state.bfloat16_compute, 1):
        assert found["kept"] == 0.0
        assert found["stored"] == {torch.float32}
        assert found["gradients"] < 3e-2
    for found in gpus.run(state.bfloat16_weights, {"grad_reduce_in_fp32": True, "preserve_fp32_weights": True}):
        assert found["gradients"] < 1e-5


@pytest.mark.parametrize("tp", TENSOR_PARALLEL)
def test_train(gpus: RankPool, tmp_path: Path, tp: int) -> None:
    """A run with either engine, and one that goes on from the checkpoint of the other."""
    mesh = ["device=cuda", f"sharding.tp={tp}", f"batch_size={8 * GPUS}"]
    ours, theirs, resumed = tmp_path / "megatron", tmp_path / "fsdp2", tmp_path / "resumed"
    gpus.run(running.run_job, running.make_job(ours, [ENGINE, *mesh]))
    gpus.run(running.run_job, running.make_job(theirs, [*mesh, "checkpoint.every=2"]))
    halfway = f"checkpoint.resume={theirs}/run/checkpoints/step-00000002"
    gpus.run(running.run_job, running.make_job(resumed, [ENGINE, *mesh, halfway]))
    for run in (ours, resumed):
        found = running.metrics(run)
        for line, wanted in zip(found, running.metrics(theirs)[-len(found) :], strict=True):
            assert line == pytest.approx(wanted, rel=1e-4)
        assert running.apart(running.weights(run / "run/model"), running.weights(theirs / "run/model")) < 1e-4


def test_commands(tmp_path: Path) -> None:
    """``shardwright verify`` and ``shardwright train``, as a user calls them."""
    shardwright = [sys.executable, "-m", "shardwright.cli"]
    subprocess.run([*shardwright, "verify", "llama", "--engine", "megatron_fsdp"], check=True, timeout=240)
    (tmp_path / "run.json").write_text(json.dumps(running.BASE))
    overrides = [ENGINE, f"output.dir={tmp_path}/run", f"batch_size={8 * GPUS}"]
    subprocess.run([*shardwright, "train", str(tmp_path / "run.json"), *overrides], check=True, timeout=240)
    assert running.metrics(tmp_path)[-1]["step"] == 4


def test_quickstart(tmp_path: Path) -> None:
    """The example, on fewer GPUs than its four ranks with the degrees that the error suggests."""
    fewer = [f"sharding.dp_shard={GPUS}", "sharding.tp=1", "sharding.sequence_parallel=false"] if GPUS < 4 else []
    short = ["steps=4", "schedule.warmup_steps=1"]
    command = [sys.executable, "-m", "shardwright.cli", "train", str(QUICKSTART), ENGINE, *short]
    subprocess.run([*command, f"output.dir={tmp_path}/run", *fewer], check=True, timeout=240)
    assert running.metrics(tmp_path)[-1]["step"] == 4
    assert (tmp_path / "run/model/config.json").is_file()
