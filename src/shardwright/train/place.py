"""Which rank this process is, as the launcher that started it says. Standard library only.

torchrun and srun tell a process its place through environment variables; that protocol is all that is read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")


@dataclass(frozen=True)
class Place:
    """One rank among many.

    Attributes:
        rank: 0 to ``world_size - 1``.
        local_rank: the same among the ranks of this machine.
        init_method: where the ranks meet, as ``torch.distributed.init_process_group`` takes it.
        attempt: how often torchrun has started the ranks of this machine anew.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    init_method: str
    attempt: int = 0


def place_from_environment(environment: Mapping[str, str]) -> Place | None:
    """The place torchrun or srun gave this process; None when it was started by hand.

    A shell inside a Slurm allocation, or ``srun`` with a single task, counts as started by hand: the job then starts
    its own local ranks.
    """
    if all(name in environment for name in _TORCHRUN):
        rank, world_size, local_rank, local_world_size = (int(environment[name]) for name in _TORCHRUN)
        attempt = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
        return Place(rank, world_size, local_rank, local_world_size, "env://", attempt)
    if all(name in environment for name in _SRUN) and int(environment["SLURM_STEP_NUM_TASKS"]) > 1:
        host = first_host(environment["SLURM_STEP_NODELIST"])
        port = 20000 + int(environment["SLURM_JOB_ID"]) % 20000  # every task computes the same one
        tasks = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[int(environment["SLURM_NODEID"])]
        return Place(
            rank=int(environment["SLURM_PROCID"]),
            world_size=int(environment["SLURM_STEP_NUM_TASKS"]),
            local_rank=int(environment["SLURM_LOCALID"]),
            local_world_size=tasks,
            init_method=f"tcp://{host}:{port}",
        )
    return None


def first_host(node_list: str) -> str:
    """The first name in Slurm's short form: ``gpu[03-05,7],login1`` -> ``gpu03``."""
    prefix, bracket, rest = node_list.partition("[")
    if not bracket or "," in prefix:
        return node_list.partition(",")[0]
    first = rest.partition("]")[0].partition(",")[0]
    return prefix + first.partition("-")[0]


def tasks_per_node(text: str) -> list[int]:
    """Slurm's short form of the tasks on each node: ``4(x2),3`` -> ``[4, 4, 3]``."""
    tasks: list[int] = []
    for part in text.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        tasks += [int(count)] * int(times or 1)
    return tasks
