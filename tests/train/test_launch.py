"""The command itself: what it prints, how it ends, and what it leaves behind.

A process that trains takes six seconds to start. So few are started: one run of two ranks of its own, one under
torchrun; how a run ends that is disturbed is seen with ranks that train nothing (``light_rank.py``).
"""

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
from click.testing import CliRunner
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from transformers import AutoModelForCausalLM

from shardwright.cli import main
from shardwright.errors import RunError
from shardwright.train.local_ranks import _cause, start_ranks

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
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "run.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # where light_rank is
    return tmp_path


def run(command: list[str], *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, *overrides], capture_output=True, text=True, timeout=250, check=False)


def test_two_ranks_of_its_own(folder: Path) -> None:
    """With an optimizer from a file that lies where the command is given, which ranks find as the command does."""
    (folder / "mine.py").write_text("import torch\nclass Mine(torch.optim.AdamW):\n    print('mine is imported')\n")
    shown = ["output.tensorboard=true", "output.log_every=1", "gpu=cpu", "steps=3"]
    done = run(TRAIN, "sharding.dp_shard=2", "optimizer.name=mine.Mine", *shown)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("mine is imported") == 2  # in the command, and in rank 0, which has the terminal
    assert re.search(r"Estimated: \d+\.\d\d of 128\.00 GiB on each a CPU with 16 cores", done.stdout)
    assert re.search(
        r"Measured: [\d.]+ GiB resident.* \(estimated: [\d.]+ GiB of tensors\), [\d,]+ tokens/s", done.stdout
    )
    assert "on 2 cpu ranks: dp_shard=2" in done.stdout
    assert "Training loss" in done.stdout
    assert len((folder / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    assert list((folder / "run" / "tensorboard").glob("events*"))
    AutoModelForCausalLM.from_pretrained(folder / "run" / "model")
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {"mine.py", "run", "run.yaml"}


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
    failed = CliRunner().invoke(main, ["train", "run.yaml", *overrides])
    assert failed.exit_code == 1
    assert failed.stdout == ""
    assert failed.stderr.startswith("Error: ")
    assert message in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["run.yaml"]


_UNDER_TORCHRUN = """
import os
from contextlib import suppress
from shardwright.cli import main
with suppress(SystemExit):
    main(["train", "run.yaml", "data.paths=stdlib:this.py", "data.sequence_length=2000"])
assert not os.path.exists("run")
os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"  # the ranks meet anew
main(["train", "run.yaml"])
"""


def test_under_torchrun_a_mistake_is_told_once_and_then_it_trains(folder: Path) -> None:
    (folder / "script.py").write_text(_UNDER_TORCHRUN)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = run([*torchrun, "script.py"])
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Error: The text is too short") == 1
    assert done.stdout.count("on 2 cpu ranks: dp_shard=2") == 1
    assert (folder / "run" / "model" / "config.json").is_file()


def start_light_ranks(folder: Path, what: str) -> str:
    """What is said of two ranks that end as ``what`` says."""
    (folder / "what").write_text(what)
    (folder / "job").mkdir()
    with pytest.raises(RunError) as error:
        start_ranks(2, folder / "job", "light_rank")
    assert not any(Path(f"/proc/{pid}").exists() for pid in light_ranks(folder))
    return str(error.value)


def light_ranks(folder: Path) -> list[int]:
    """The process ids of both, once they run."""
    files = [folder / "rank-0", folder / "rank-1"]
    end = time.monotonic() + 100
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < end, "the ranks did not start"
        time.sleep(0.05)
    return [int(file.read_text()) for file in files]


def test_what_the_ranks_refuse_is_told_once(folder: Path) -> None:
    assert start_light_ranks(folder, "refuse") == "The first step differs: by 2"


def test_a_rank_that_dies_ends_the_run_with_its_name(folder: Path) -> None:
    said = start_light_ranks(folder, "rank 1 dies")
    assert said.startswith("Rank 1 died: Signal 9 (SIGKILL)")


_WITH_LIGHT_RANKS = """
from shardwright.train import launch
start = launch.start_ranks
launch.start_ranks = lambda ranks, job, module: start(ranks, job, "light_rank")
from shardwright.cli import main
main(["train", "run.yaml", "sharding.dp_shard=2"])
"""


def test_an_interrupt_ends_every_rank(folder: Path) -> None:
    (folder / "what").write_text("stay")
    command = [sys.executable, "-c", _WITH_LIGHT_RANKS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        ranks = light_ranks(folder)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=200)
    assert process.returncode == 1
    assert stderr == "Error: Stopped by SIGINT; all 2 ranks have ended.\n"
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


_LAUNCHER = """
from pathlib import Path
from shardwright.train.local_ranks import start_ranks
start_ranks(2, Path("job"), "light_rank")
"""


def test_ranks_do_not_outlive_a_killed_launcher(folder: Path) -> None:
    (folder / "what").write_text("stay")
    (folder / "job").mkdir()
    with subprocess.Popen([sys.executable, "-c", _LAUNCHER]) as process:
        ranks = light_ranks(folder)
        process.kill()
    end = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < end, "the ranks go on"
        time.sleep(0.1)
    assert not (folder / "job").exists()


def test_a_rank_that_crashes_after_it_refused(tmp_path: Path) -> None:
    """As some do under torch 2.11 while they end; the other was told to end."""
    report = tmp_path / "error.json"
    extra = {"py_callstack": "Traceback", "timestamp": "1"}
    report.write_text(json.dumps({"message": {"message": "ParityError: differs: by 2", "extraInfo": extra}}))
    failures = {rank: ProcessFailure(rank, 1, code, str(report)) for rank, code in ((1, -6), (0, -15))}
    cause = _cause(ChildFailedError("ranks", failures), tmp_path)
    assert (type(cause), str(cause)) == (RunError, "differs: by 2")
