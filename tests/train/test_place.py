"""The place of a rank, from the variables of torchrun and srun."""

from __future__ import annotations

import pytest

from shardwright.train.place import Place, first_host, place_from_environment, tasks_per_node

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4,2",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_JOB_ID": "120007",
}


def test_started_by_hand() -> None:
    assert place_from_environment({}) is None
    assert place_from_environment({"RANK": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None  # a shell in a job
    assert place_from_environment({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}) is None


def test_torchrun_and_srun() -> None:
    assert place_from_environment(TORCHRUN) == Place(5, 8, 1, 4, "env://")
    assert place_from_environment(SRUN) == Place(5, 6, 1, 2, "tcp://gpu03:20007")
    assert place_from_environment({**SRUN, **TORCHRUN}) == Place(5, 8, 1, 4, "env://")  # torchrun inside srun


@pytest.mark.parametrize(
    ("short", "host"),
    [("n1", "n1"), ("n1,n2", "n1"), ("gpu[03-05,7],login1", "gpu03"), ("a,b[1-2]", "a"), ("rack[2,4]", "rack2")],
)
def test_first_host(short: str, host: str) -> None:
    assert first_host(short) == host


def test_tasks_per_node() -> None:
    assert tasks_per_node("4(x2),3") == [4, 4, 3]
