"""The command itself, in fresh processes: what it prints, how it ends, and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from transformers import AutoModelForCausalLM

from shardwright.errors import RunError
from shardwright.train.local_ranks import _cause

CONFIG = """
model:
  config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}
tokenizer: {vocab_size: 300}
data: {paths: "stdlib:json", include: "*.py", sequence_length: 24}
output: {dir: run, tensorboard: false}
steps: 2
device: cpu
"""
TRAIN = [sys.executable, "-m", "shardwright.cli", "train", "run.yaml"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(CONFIG)
    return tmp_path


def run(folder: Path, command: list[str], *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, *overrides], cwd=folder, capture_output=True, text=True, timeout=250, check=False)


def test_two_ranks_of_its_own(folder: Path) -> None:
    done = run(
        folder, TRAIN, "sharding.dp_shard=2", "output.tensorboard=true", "gpu=cpu", "steps=3", "output.log_every=1"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"Estimated: \d+\.\d\d of 128\.00 GiB on each a CPU with 16 cores", done.stdout)
    assert re.search(
        r"Measured: [\d.]+ GiB resident.* \(estimated: [\d.]+ GiB of tensors\), [\d,]+ tokens/s", done.stdout
    )
    assert "on 2 cpu ranks: dp_shard=2" in done.stdout
    assert "Training loss" in done.stdout
    assert len((folder / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    assert list((folder / "run" / "tensorboard").glob("events*"))
    AutoModelForCausalLM.from_pretrained(folder / "run" / "model")
    assert sorted(path.name for path in folder.iterdir()) == ["run", "run.yaml"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stepps=2"], "Unknown key 'stepps'. Did you mean 'steps'?"),
        (["sharding.engine=megatron_fsdp"], "runs on CUDA devices only"),
        (["sharding.dp_shard=2", "ranks=3"], "but the world size is 3"),
        (["data.paths=stdlib:this.py", "data.sequence_length=2000"], "The text is too short: 1 file gives"),
    ],
)
def test_a_mistake_is_one_paragraph(folder: Path, overrides: list[str], message: str) -> None:
    failed = run(folder, TRAIN, *overrides)
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert failed.stderr.startswith("Error: ")
    assert message in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["run.yaml"]


def test_what_the_ranks_refuse_is_told_once(folder: Path) -> None:
    """Dropout shows only once there are ranks: every one of them raises, and the reader sees it once."""
    failed = run(folder, TRAIN, "sharding.dp_shard=2", "check_first_step=true", "model.config.attention_dropout=0.5")
    assert failed.returncode == 1
    assert failed.stderr.startswith("Error: The first step differs from one process")
    assert failed.stderr.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["run.yaml"]


def test_a_rank_that_crashes_after_it_refused(tmp_path: Path) -> None:
    """As some do under torch 2.11 while they end; the other was told to end."""
    report = tmp_path / "error.json"
    extra = {"py_callstack": "Traceback", "timestamp": "1"}
    report.write_text(json.dumps({"message": {"message": "ParityError: differs: by 2", "extraInfo": extra}}))
    failures = {rank: ProcessFailure(rank, 1, code, str(report)) for rank, code in ((1, -6), (0, -15))}
    cause = _cause(ChildFailedError("ranks", failures), tmp_path)
    assert (type(cause), str(cause)) == (RunError, "differs: by 2")


def test_under_torchrun_a_mistake_is_told_once(folder: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "shardwright.cli", "train", "run.yaml"]
    failed = run(folder, command, "data.paths=stdlib:this.py", "data.sequence_length=2000")
    assert failed.returncode != 0
    assert failed.stderr.count("Error: The text is too short") == 1
    assert not (folder / "run").exists()


def test_under_torchrun_it_trains(folder: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = run(folder, [*torchrun, "-m", "shardwright.cli", "train", "run.yaml"])
    assert done.returncode == 0
    assert done.stdout.count("on 2 cpu ranks: dp_shard=2") == 1
    assert (folder / "run" / "model" / "config.json").is_file()


def test_a_rank_that_dies_ends_the_run_with_its_name(folder: Path) -> None:
    command = [*TRAIN, "sharding.dp_shard=2", "steps=100000"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for(folder / "run" / "metrics.jsonl")
        victim = next(pid for pid, rank in workers_of(process.pid) if rank == "1")
        os.kill(victim, signal.SIGKILL)
        _, stderr = process.communicate(timeout=200)
    assert process.returncode == 1
    assert stderr.startswith("Error: Rank 1 died: Signal 9 (SIGKILL)")
    assert not (folder / "run" / "model").exists()


def test_ranks_do_not_outlive_a_killed_launcher(folder: Path) -> None:
    with subprocess.Popen(
        [*TRAIN, "sharding.dp_shard=2", "steps=100000"], cwd=folder, stdout=subprocess.DEVNULL
    ) as process:
        wait_for(folder / "run" / "metrics.jsonl")
        ranks = [pid for pid, _ in workers_of(process.pid)]
        process.kill()
    assert len(ranks) == 2
    end = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < end, "the ranks go on"
        time.sleep(0.1)


def test_an_interrupt_ends_every_rank(folder: Path) -> None:
    command = [*TRAIN, "sharding.dp_shard=2", "steps=100000"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for(folder / "run" / "metrics.jsonl")
        ranks = [pid for pid, _ in workers_of(process.pid)]
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=200)
    assert process.returncode == 1
    assert stderr == "Error: Stopped by SIGINT; all 2 ranks have ended.\n"
    assert len(ranks) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    first = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 1


def wait_for(file: Path) -> None:
    """Until ``file`` has content."""
    end = time.monotonic() + 200
    while not (file.exists() and file.stat().st_size):
        assert time.monotonic() < end, f"{file} did not appear"
        time.sleep(0.1)


def workers_of(parent: int) -> list[tuple[int, str]]:
    """Process id and RANK of every child of ``parent``."""
    found = []
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found += [(int(pid), entry.removeprefix(b"RANK=").decode()) for entry in environment if entry[:5] == b"RANK="]
    return found
