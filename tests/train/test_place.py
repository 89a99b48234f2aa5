"""The place of a rank, from the variables of torchrun and srun."""

from __future__ import annotations

import pytest

from shardwright.errors import ConfigError
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


def test_ranks_that_are_told_nothing_about_their_machine_find_it_out() -> None:
    kubernetes = {"RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    place = place_from_environment(kubernetes)
    assert place == Place(2, 4, None, None, "env://")
    assert place.among(["a", "b", "a", "b"]) == Place(2, 4, 1, 2, "env://")
    assert place.among(["a", "b", "c", "d"]) == Place(2, 4, 0, 1, "env://")


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        (
            {"RANK": "0", "WORLD_SIZE": "2"},
            "one of 2 by its environment (RANK and WORLD_SIZE), but MASTER_ADDR",
        ),
        ({"RANK": "1"}, "one of several by its environment (RANK), but WORLD_SIZE, MASTER_ADDR"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "(SLURM_PROCID), but SLURM_STEP_NUM_TASKS, SLURM_LOCALID"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, "one of 2 by its environment (SLURM_STEP_NUM_TASKS)"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "(OMPI_COMM_WORLD_SIZE of mpirun)"),
        ({**TORCHRUN, "RANK": "five"}, "RANK is 'five'; it must be a number"),
        ({**TORCHRUN, "RANK": "8"}, "rank 8 of 8"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "number 4 of 4"),
        ({**SRUN, "SLURM_NODEID": "2"}, "SLURM_NODEID is 2"),
        ({"WORLD_SIZE": "-1", "RANK": "0"}, "WORLD_SIZE is '-1'"),
    ],
)
def test_ranks_that_cannot_find_each_other_are_refused(environment: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        place_from_environment(environment)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("short", "host"),
    [("n1", "n1"), ("n1,n2", "n1"), ("gpu[03-05,7],login1", "gpu03"), ("a,b[1-2]", "a"), ("rack[2,4]", "rack2")],
)
def test_first_host(short: str, host: str) -> None:
    assert first_host(short) == host


def test_tasks_per_node() -> None:
    assert tasks_per_node("4(x2),3") == [4, 4, 3]
