"""Real runs of ``shardwright train`` that are killed, stopped, pre-empted and starved; then resumed and compared.

Nothing here waits for a time: a run has got to where it is disturbed when its metrics say so, and the limits only end
a test that would otherwise hang.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from shardwright.checkpoint.manifest import verify
from shardwright.checkpoint.run_info import list_checkpoints

pytestmark = [pytest.mark.fault, pytest.mark.timeout(1500)]

LIMIT = 400  # seconds until a run that should have ended is given up
STEPS = 40
CONFIG = f"""
model:
  config: {{model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 1, num_attention_heads: 2,
           attention_dropout: 0.1}}
tokenizer: {{vocab_size: 300}}
data: {{paths: "stdlib:json", include: "*.py", sequence_length: 24}}
output: {{dir: run, tensorboard: false}}
optimizer: {{lr: 1.e-2}}
checkpoint: {{every: 3, resume: true}}
steps: {STEPS}
device: cpu
"""
TRAIN = [sys.executable, "-m", "shardwright.cli", "train", "run.yaml", "sharding.dp_shard=2"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(CONFIG)
    return tmp_path


def _start(folder: Path, *overrides: str, command: Sequence[str] = TRAIN, room: int | None = None) -> subprocess.Popen:
    """A run in ``folder``; ``room``: the most bytes that any of its files may have, as on a disk that gets full."""
    limit = None if room is None else partial(resource.setrlimit, resource.RLIMIT_FSIZE, (room, room))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, *overrides], cwd=folder, text=True, preexec_fn=limit, **pipes)


def _metrics(folder: Path) -> list[dict[str, float]]:
    file = folder / "run" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


def _losses(folder: Path) -> dict[int, float]:
    return {int(line["step"]): line["loss"] for line in _metrics(folder)}


def _until(folder: Path, step: int, process: subprocess.Popen) -> dict[int, int]:
    """Wait until ``step`` is behind the run; returns the process ids of its ranks."""
    end = time.monotonic() + LIMIT
    while max(_losses(folder), default=0) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"step {step} was not reached"
        time.sleep(0.01)
    return _ranks_of(process.pid)


def _ranks_of(parent: int) -> dict[int, int]:
    """Rank -> process id of the children of ``parent`` that are ranks."""
    found = {}
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found |= {int(entry[5:]): int(pid) for entry in environment if entry.startswith(b"RANK=")}
    return found


def _whole_checkpoints(folder: Path) -> list[int]:
    """The steps that have a checkpoint, every one of which must be whole."""
    checkpoints = list_checkpoints(folder / "run" / "checkpoints")
    for checkpoint in checkpoints:
        verify(checkpoint)
    return [int(path.name.removeprefix("step-")) for path in checkpoints]


def _gone(ranks: dict[int, int]) -> bool:
    return len(ranks) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())


def _kill_one_rank(folder: Path) -> None:
    with _start(folder) as process:
        ranks = _until(folder, 7, process)  # the save of step 6 has waited for that of step 3 by then
        os.kill(ranks[1], signal.SIGKILL)
        _, error = process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    assert "Rank 1 died: Signal 9 (SIGKILL)" in error
    assert _gone(ranks)


def _kill_all_while_they_save(folder: Path) -> None:
    with _start(folder, "checkpoint.every=1") as process:
        ranks = _until(folder, 14, process)
        for pid in [process.pid, *ranks.values()]:
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=LIMIT)


def _preempt(folder: Path) -> None:
    before = _whole_checkpoints(folder)
    with _start(folder, "checkpoint.every=1000") as process:
        ranks = _until(folder, 21, process)
        process.send_signal(signal.SIGTERM)
        said, error = process.communicate(timeout=LIMIT)
    assert process.returncode == 75, error
    assert f"Resumed after step {before[-1]}." in said
    assert "checkpoint.resume=true goes on from" in error
    assert _whole_checkpoints(folder)[-1] >= 21
    assert _gone(ranks)


def _fill_the_disk(folder: Path) -> None:
    before = _whole_checkpoints(folder)
    with _start(folder, room=150_000) as process:
        said, error = process.communicate(timeout=LIMIT)
    assert process.returncode == 1, error
    assert f"Resumed after step {before[-1]}." in said
    assert "File too large" in error
    assert "__1_0.distcp" in error
    assert error.count("\n") == 1
    assert _whole_checkpoints(folder) == before


def _kill_a_rank_under_torchrun(folder: Path) -> None:
    with _start(folder, command=[*TORCHRUN, *TRAIN[1:]]) as process:
        ranks = _until(folder, 30, process)
        os.kill(ranks[0], signal.SIGKILL)
        _, error = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, error
    assert _gone(ranks)


ENDS = (_kill_one_rank, _kill_all_while_they_save, _preempt, _fill_the_disk, _kill_a_rank_under_torchrun)


def test_a_run_that_is_ended_in_every_way_equals_an_unbroken_one(folder: Path) -> None:
    """One run, ended five times and resumed from what its last checkpoint had, step by step to the last bit."""
    unbroken = folder / "unbroken"
    with _start(folder, "output.dir=unbroken/run") as process:
        _, error = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, error
    assert list(_losses(unbroken)) == list(range(1, STEPS + 1))

    for end in ENDS:
        end(folder)
        assert _whole_checkpoints(folder), end.__name__
        steps = _losses(folder)
        assert steps == {step: _losses(unbroken)[step] for step in steps}, end.__name__
    assert _losses(folder) == _losses(unbroken)
    assert not list((folder / "run" / "checkpoints").glob(".*"))  # what was unfinished has been cleared up
    weights = Path("run") / "model" / "model.safetensors"
    assert (folder / weights).read_bytes() == (unbroken / weights).read_bytes()


def test_a_rank_that_hangs_is_named(folder: Path) -> None:
    with _start(folder, "steps=100000", "step_timeout=20", "checkpoint.every=100000") as process:  # no save may be met
        ranks = _until(folder, 2, process)
        os.kill(ranks[1], signal.SIGSTOP)
        _, error = process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    assert "Rank 0 has been in step" in error
    assert "torch.distributed's" in error
    assert "Nothing was heard of rank(s) 1" in error
    assert _gone(ranks)
