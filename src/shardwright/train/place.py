"""Which rank this process is, as the launcher that started it says. Standard library only.

Launchers tell a process its place through environment variables; that protocol is all that is read here. A process that
is one of several and cannot find the others is refused: each would train a model of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from shardwright.errors import ConfigError

_LOCAL = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
_MEETING = ("MASTER_ADDR", "MASTER_PORT")
_SRUN = (
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_STEP_NODELIST",
    "SLURM_JOB_ID",
)
# The number of processes, by launchers that say no more than a process's own number.
_OTHERS = {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "an MPI launcher", "MV2_COMM_WORLD_SIZE": "mpirun"}


@dataclass(frozen=True)
class Place:
    """One rank among many.

    Attributes:
        rank: 0 to ``world_size - 1``.
        local_rank: the same among the ranks of this machine; None: not known before the ranks have met.
        init_method: where the ranks meet, as ``torch.distributed.init_process_group`` takes it.
        attempt: how often torchrun has started the ranks of this machine anew.
    """

    rank: int
    world_size: int
    local_rank: int | None
    local_world_size: int | None
    init_method: str
    attempt: int = 0

    def among(self, hosts: Sequence[str]) -> Place:
        """This place with its numbers on this machine, where ``hosts`` has the name of every rank's machine."""
        here = [rank for rank, host in enumerate(hosts) if host == hosts[self.rank]]
        return replace(self, local_rank=here.index(self.rank), local_world_size=len(here))


def place_from_environment(environment: Mapping[str, str]) -> Place | None:
    """The place that a launcher gave this process; None when it was started by hand.

    torchrun says all of it. A launcher that says rank, world size and where to meet, and nothing about the machine
    (Kubernetes operators), leaves that to be found out. ``srun`` has its own words. A shell inside a Slurm allocation,
    or a single task, counts as started by hand: the job then starts its own local ranks.

    Raises:
        ConfigError: this process is one of several, and what the others need to be found is missing or no number.
    """
    world_size = _number(environment, "WORLD_SIZE", 1)
    if ("RANK" in environment and world_size > 1) or all(name in environment for name in ("RANK", *_LOCAL)):
        missing = [name for name in _MEETING if name not in environment]
        if missing and not all(name in environment for name in _LOCAL):
            raise ConfigError(_alone(world_size, "RANK and WORLD_SIZE", missing))
        return _checked(
            Place(
                _number(environment, "RANK"),
                world_size,
                _number(environment, "LOCAL_RANK") if all(name in environment for name in _LOCAL) else None,
                _number(environment, "LOCAL_WORLD_SIZE") if all(name in environment for name in _LOCAL) else None,
                "env://",
                _number(environment, "TORCHELASTIC_RESTART_COUNT", 0),
            )
        )
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS", 1)
    if tasks > 1:
        missing = [name for name in _SRUN if name not in environment]
        if missing:
            raise ConfigError(_alone(tasks, "SLURM_STEP_NUM_TASKS", missing))
        host = first_host(environment["SLURM_STEP_NODELIST"])
        port = 20000 + _number(environment, "SLURM_JOB_ID") % 20000  # every task computes the same one
        counts = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
        node, local = _number(environment, "SLURM_NODEID"), _number(environment, "SLURM_LOCALID")
        if node >= len(counts):
            raise ConfigError(f"SLURM_NODEID is {node}, but SLURM_STEP_TASKS_PER_NODE has {len(counts)} nodes.")
        return _checked(Place(_number(environment, "SLURM_PROCID"), tasks, local, counts[node], f"tcp://{host}:{port}"))
    _require_by_hand(environment)
    return None


def _require_by_hand(environment: Mapping[str, str]) -> None:
    """Raises ConfigError where something else shows that this process is one of several."""
    for name, launcher in _OTHERS.items():
        count = _number(environment, name, 1)
        if count > 1:
            raise ConfigError(_alone(count, f"{name} of {launcher}", ["RANK", "WORLD_SIZE", *_MEETING]))
    for name, more in (("RANK", ["WORLD_SIZE", *_MEETING]), ("SLURM_PROCID", ["SLURM_STEP_NUM_TASKS", *_SRUN[1:]])):
        if more[0] not in environment and _number(environment, name, 0) > 0:
            raise ConfigError(_alone(0, name, [other for other in more if other not in environment]))


def _alone(count: int, known: str, missing: Sequence[str]) -> str:
    return (
        f"This process is one of {count or 'several'} by its environment ({known}), but {', '.join(missing)} "
        f"{'is' if len(missing) == 1 else 'are'} not set, so the others cannot be found. Start the ranks with torchrun "
        "or srun, set what is missing, or unset all of it to start local ranks."
    )


def _number(environment: Mapping[str, str], name: str, otherwise: int | None = None) -> int:
    text = environment.get(name, "" if otherwise is None else str(otherwise))
    if not text.isascii() or not text.isdecimal() or len(text) > 12:
        raise ConfigError(f"The environment variable {name} is {text[:40]!r}; it must be a number.")
    return int(text)


def _checked(place: Place) -> Place:
    local, count = place.local_rank or 0, place.local_world_size or place.world_size
    if place.rank >= place.world_size or local >= count or count > place.world_size:
        raise ConfigError(
            f"By the environment this is rank {place.rank} of {place.world_size}, number {local} of {count} on this "
            "machine, which cannot be. Is something set twice, by two launchers?"
        )
    return place


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
