"""Real runs of ``shardwright train`` that are killed, stopped, starved and lied to; then resumed and compared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from shardwright.checkpoint.manifest import verify
from shardwright.checkpoint.store import list_checkpoints

pytestmark = [pytest.mark.fault, pytest.mark.timeout(600)]

CONFIG = """
model:
  config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2,
           attention_dropout: 0.1}
tokenizer: {vocab_size: 300}
data: {paths: "stdlib:json", include: "*.py", sequence_length: 24}
output: {dir: run, tensorboard: false}
optimizer: {lr: 1.e-2}
checkpoint: {every: 3, resume: true}
steps: 40
device: cpu
"""
COMMAND = [sys.executable, "-m", "shardwright.cli", "train", "run.yaml"]
FSDP2 = "sharding.dp_shard=2"
TP2 = "sharding.tp=2"
NO_DROPOUT = "model.config.attention_dropout=0.0"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(CONFIG)
    return tmp_path


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of a run that nothing happens to, by step."""
    folder = tmp_path_factory.mktemp("unbroken")
    (folder / "run.yaml").write_text(CONFIG)
    assert _run(folder, FSDP2).returncode == 0
    return _losses(folder)


def _run(folder: Path, *overrides: str, command: Sequence[str] = COMMAND) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, *overrides], cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def _losses(folder: Path) -> dict[int, float]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines)}


def _steps_done(folder: Path) -> int:
    file = folder / "run" / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def _until(folder: Path, steps: int, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 200
    while _steps_done(folder) < steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def _ranks_of(parent: int) -> dict[int, int]:
    """Rank -> process id of the worker processes below ``parent``."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/environ"):
        pid = int(status.parent.name)
        try:
            above = int((status.parent / "stat").read_text().rpartition(")")[2].split()[1])
            environment = dict(part.partition("=")[::2] for part in status.read_text().split("\0"))
        except (OSError, ValueError):
            continue
        if above == parent and "RANK" in environment:
            found[int(environment["RANK"])] = pid
    return found


def _start(folder: Path, *overrides: str, command: Sequence[str] = COMMAND) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, *overrides], cwd=folder, text=True, **pipes)


def _all_whole(folder: Path) -> list[int]:
    checkpoints = list_checkpoints(folder / "run" / "checkpoints")
    for checkpoint in checkpoints:
        verify(checkpoint)
    return [int(path.name.removeprefix("step-")) for path in checkpoints]


@pytest.mark.parametrize("steps", [7, 22])
def test_a_killed_rank_loses_nothing_that_a_checkpoint_had(
    folder: Path, unbroken: dict[int, float], steps: int
) -> None:
    with _start(folder, FSDP2) as process:
        _until(folder, steps, process)
        ranks = _ranks_of(process.pid)
        os.kill(ranks[1], signal.SIGKILL)
        _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Rank 1 died: Signal 9 (SIGKILL)" in error
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    assert _all_whole(folder)
    resumed = _run(folder, FSDP2)
    assert resumed.returncode == 0, resumed.stderr
    assert "Resumed after step" in resumed.stdout
    assert _losses(folder) == unbroken


def test_every_process_killed_while_it_saves(folder: Path, unbroken: dict[int, float]) -> None:
    for steps in (5, 15, 25):
        with _start(folder, FSDP2, "checkpoint.every=1") as process:
            _until(folder, steps, process)
            for pid in [process.pid, *_ranks_of(process.pid).values()]:
                os.kill(pid, signal.SIGKILL)
            process.communicate(timeout=60)
        assert _all_whole(folder)
    assert _run(folder, FSDP2).returncode == 0
    assert _losses(folder) == unbroken
    assert not list((folder / "run" / "checkpoints").glob(".*"))


def test_sigterm_saves_and_says_so(folder: Path, unbroken: dict[int, float]) -> None:
    with _start(folder, FSDP2, "checkpoint.every=1000") as process:
        _until(folder, 10, process)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=120)
    assert process.returncode == 75, error
    assert "checkpoint.resume=true goes on from" in error
    (step,) = _all_whole(folder)
    assert step >= 10
    assert _run(folder, FSDP2).returncode == 0
    assert _losses(folder) == unbroken


def test_torchrun_restarts_what_was_killed(folder: Path, unbroken: dict[int, float]) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    with _start(folder, FSDP2, command=[*torchrun, "--standalone", *COMMAND[1:]]) as process:
        _until(folder, 10, process)
        os.kill(_ranks_of(process.pid)[0], signal.SIGKILL)
        _, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    assert _losses(folder) == unbroken


def test_a_rank_that_hangs_is_named(folder: Path) -> None:
    with _start(folder, FSDP2, "steps=100000", "step_timeout=20") as process:
        _until(folder, 5, process)
        stopped = _ranks_of(process.pid)[1]
        os.kill(stopped, signal.SIGSTOP)
        _, error = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "Rank 0 has been in step" in error
    assert "torch.distributed's" in error
    assert "Nothing was heard of rank(s) 1" in error
    assert not Path(f"/proc/{stopped}").exists()


def test_resumed_at_another_mesh(folder: Path) -> None:
    assert _run(folder, FSDP2, NO_DROPOUT, "output.dir=whole").returncode == 0
    with _start(folder, FSDP2, NO_DROPOUT) as process:
        _until(folder, 10, process)
        os.kill(_ranks_of(process.pid)[0], signal.SIGKILL)
        process.communicate(timeout=120)
    resumed = _run(folder, TP2, NO_DROPOUT)
    assert resumed.returncode == 0, resumed.stderr
    (folder / "run" / "metrics.jsonl").rename(folder / "mine.jsonl")
    (folder / "whole" / "metrics.jsonl").rename(folder / "run" / "metrics.jsonl")
    expected = _losses(folder)
    (folder / "mine.jsonl").rename(folder / "run" / "metrics.jsonl")
    assert _losses(folder) == pytest.approx(expected, rel=1e-4)


def test_a_flipped_bit_is_named(folder: Path) -> None:
    assert _run(folder, FSDP2, "steps=6").returncode == 0
    file = folder / "run" / "checkpoints" / "step-00000006" / "state" / "__1_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    refused = _run(folder, FSDP2)
    assert refused.returncode == 1
    assert "__1_0.distcp" in refused.stderr
    assert "checksum" in refused.stderr
    earlier = _run(folder, FSDP2, "checkpoint.resume=run/checkpoints/step-00000003", "steps=6")
    assert earlier.returncode == 0, earlier.stderr


def test_ranks_with_other_configs_stop_before_the_first_step(folder: Path) -> None:
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29731"}
    processes = []
    for rank, rate in enumerate(("1e-2", "2e-2")):
        environment = {**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [*COMMAND, FSDP2, f"optimizer.lr={rate}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes))
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert "Rank 1 has config" in errors[0]
    assert not (folder / "run").exists()


def test_a_gradient_that_is_no_number(folder: Path) -> None:
    raised = _run(folder, FSDP2, "optimizer.lr=1e30")
    assert raised.returncode == 1
    assert "first in the gradient of model." in raised.stderr
    skipped = _run(folder, FSDP2, "optimizer.lr=1e30", "not_finite=skip", "output.dir=skip", "steps=4")
    assert skipped.returncode == 0, skipped.stderr
    assert skipped.stdout.count("It is left out.") == 3


def test_export_and_inspect_on_the_command_line(folder: Path) -> None:
    assert _run(folder, FSDP2, "steps=3").returncode == 0
    shardwright = COMMAND[:3]
    told = _run(folder, "inspect", "run", command=shardwright)
    assert told.returncode == 0, told.stderr
    assert "step-00000003" in told.stdout
    assert _run(folder, "export", "run", "out", command=shardwright).returncode == 0
    assert (folder / "out" / "tokenizer.json").read_text() == (folder / "run" / "model" / "tokenizer.json").read_text()
    weights = "model.safetensors"
    assert (folder / "out" / weights).read_bytes() == (folder / "run" / "model" / weights).read_bytes()
    assert _run(folder, "inspect", "nothing", command=shardwright).returncode == 1
