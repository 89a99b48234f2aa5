"""The recipes in ``launch/``, each started by the launcher that it is for, on this machine."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import yaml
from slurm_cluster import SlurmCluster

LAUNCH = Path(__file__).parents[2] / "launch"
CONFIG = """
model:
  config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}
tokenizer: {vocab_size: 300}
data: {paths: "stdlib:json", include: "*.py", sequence_length: 24}
output: {dir: run, tensorboard: false}
checkpoint: {every: 10}
steps: 2
device: cpu
"""
# The commands of this environment are found by name, as they are where a user has activated theirs.
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

pytestmark = pytest.mark.launcher


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(CONFIG)
    return tmp_path


def need(program: str, package: str) -> None:
    if shutil.which(program, path=f"{ENVIRONMENT['PATH']}:/usr/sbin") is None:
        pytest.skip(f"{program} is not installed (Debian: apt-get install {package})")


def run_all(folder: Path, *commands: tuple[list[str], Mapping[str, str]]) -> str:
    """Run commands side by side to their end; what they printed, once all have ended well."""
    with ExitStack() as stack:
        started = [
            stack.enter_context(
                subprocess.Popen(
                    command,
                    cwd=folder,
                    env=ENVIRONMENT | more,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
            for command, more in commands
        ]
        stack.callback(lambda: [process.kill() for process in started])
        printed = [process.communicate(timeout=250)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(commands), "\n".join(printed)
    return "\n".join(printed)


def check(folder: Path, printed: str) -> None:
    """One run of two ranks, told by one of them, and its model."""
    assert printed.count("on 2 cpu ranks: dp_shard=2") == 1
    assert (folder / "run" / "model" / "config.json").is_file()


def test_torchrun_on_two_machines(folder: Path) -> None:
    command = [str(LAUNCH / "torchrun.sh"), "2", "1", "localhost:29417", "run.yaml"]
    check(folder, run_all(folder, (command, {}), (command, {})))


def test_torchrun_starts_ranks_anew(folder: Path) -> None:
    """A rank that was killed; all of them go on from the newest checkpoint."""
    command = [str(LAUNCH / "torchrun.sh"), "1", "2", "localhost:29421", "run.yaml", "steps=40", "checkpoint.every=5"]
    output = folder / "out.txt"
    with (
        output.open("w") as file,
        subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT) as torchrun,
    ):
        wait(lambda: list(folder.glob("run/checkpoints/step-*")), output)
        ranks = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        assert len(ranks) == 2
        os.kill(int(ranks[1]), signal.SIGKILL)
        assert torchrun.wait(250) == 0, output.read_text()
    assert output.read_text().count("Resumed after step") == 1
    assert (folder / "run" / "model" / "config.json").is_file()


def test_ray(folder: Path) -> None:
    """Two workers, twice: the second run goes on from the checkpoint of the first."""
    pytest.importorskip("ray.train", reason="Ray is not installed (pip install 'shardwright[ray]')")
    command = [sys.executable, str(LAUNCH / "ray_train.py"), "run.yaml", "--workers=2", f"output.dir={folder}/run"]
    check(folder, run_all(folder, ([*command, "checkpoint.every=2"], {})))
    printed = run_all(folder, ([*command, "checkpoint.every=2", "steps=4"], {}))
    assert printed.count("Resumed after step 2") == 1


def test_accelerate(folder: Path) -> None:
    command = [
        "accelerate",
        "launch",
        "--multi_gpu",
        "--num_processes=2",
        "--num_machines=1",
        "--main_process_port=29418",
    ]
    check(folder, run_all(folder, ([*command, "-m", "shardwright.cli", "train", "run.yaml"], {})))


def test_mpirun(folder: Path) -> None:
    need("mpirun", "openmpi-bin openssh-client")
    address = ["-x", "MASTER_ADDR=localhost", "-x", "MASTER_PORT=29419"]
    command = ["mpirun", "-n", "2", "--oversubscribe", *address, str(LAUNCH / "mpi-rank.sh")]
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    check(folder, run_all(folder, ([*command, "shardwright", "train", "run.yaml"], as_root)))


def test_jobset(folder: Path) -> None:
    """Two pods' commands with the environment that the manifest gives them, one rank each."""
    manifest = yaml.safe_load((LAUNCH / "kubernetes" / "jobset.yaml").read_text())
    group = manifest["spec"]["replicatedJobs"][0]
    pod = group["template"]["spec"]
    container = pod["template"]["spec"]["containers"][0]
    given = {entry["name"]: entry.get("value") for entry in container["env"]}
    host = f"{manifest['metadata']['name']}-{group['name']}-0-0.{manifest['metadata']['name']}"
    assert given["PET_MASTER_ADDR"] == host  # JobSet's name for the first pod
    assert given["PET_NPROC_PER_NODE"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    assert given["PET_NNODES"] == str(pod["completions"])
    here = {"PET_MASTER_ADDR": "localhost", "PET_MASTER_PORT": "29420", "PET_NPROC_PER_NODE": "1"}
    pods = [{**given, **here, "PET_NODE_RANK": str(index)} for index in range(pod["completions"])]
    check(folder, run_all(folder, *((container["command"], environment) for environment in pods)))


def test_trainjob_starts_what_the_jobset_starts() -> None:
    trainer = yaml.safe_load((LAUNCH / "kubernetes" / "trainjob.yaml").read_text())["spec"]["trainer"]
    jobset = yaml.safe_load((LAUNCH / "kubernetes" / "jobset.yaml").read_text())
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert trainer["command"] == pod["containers"][0]["command"]
    assert trainer["numProcPerNode"] == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    need("slurmctld", "slurm-wlm")
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons want to be root")
    with SlurmCluster(tmp_path_factory.mktemp("slurm"), ENVIRONMENT) as running:
        yield running


@pytest.mark.timeout(800)
def test_slurm_saves_requeues_and_resumes(cluster: SlurmCluster, folder: Path) -> None:
    """Two nodes with a task each; SIGTERM to the tasks is what Slurm itself sends before the time is over."""
    options = ["--ntasks-per-node=1", "--gpus-per-node=0", "--time=10", "--output=out.txt"]
    script = [str(LAUNCH / "slurm.sbatch"), "run.yaml", "steps=100000"]
    job = cluster.call("sbatch", "--parsable", *options, *script, cwd=folder).strip()
    wait(lambda: list(folder.glob("run/checkpoints/step-*")), folder / "out.txt")
    cluster.call("scancel", "--signal=TERM", job)
    wait(lambda: "Restarts=1" in cluster.call("scontrol", "show", "job", job), folder / "out.txt")
    wait(lambda: resumed(cluster, job, folder / "out.txt"), folder / "out.txt")
    cluster.call("scancel", job)
    printed = (folder / "out.txt").read_text()
    assert "on 2 cpu ranks: dp_shard=2" in printed
    assert printed.count("has its checkpoint. The same command with checkpoint.resume=true goes on") == 1


def resumed(cluster: SlurmCluster, job: str, output: Path) -> bool:
    """Slurm lets a job that was queued again wait for two minutes; this one waits for three seconds.

    Started in the second in which it was queued, Slurm would take its new permission to run for the revoked one.
    """
    shown = cluster.call("scontrol", "show", "job", job)
    eligible = re.search(r"EligibleTime=(\d\S+)", shown)
    late = datetime.now() + timedelta(seconds=10)
    if "JobState=PENDING" in shown and eligible and datetime.fromisoformat(eligible[1]) > late:
        cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now+3")
    return "Resumed after step" in output.read_text()


def wait(happened: object, output: Path) -> None:
    end = time.monotonic() + 250
    while not happened():  # type: ignore[operator]
        assert time.monotonic() < end, output.read_text() if output.is_file() else "no output"
        time.sleep(0.3)
