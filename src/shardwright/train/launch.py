"""From one command to many ranks: local ones that it starts itself, or those torchrun or srun has started."""

from __future__ import annotations

import logging
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from shardwright.checkpoint.store import list_checkpoints
from shardwright.distributed.apply import megatron_fsdp
from shardwright.distributed.mesh import default_device_type, make_mesh
from shardwright.errors import ConfigError, PreemptedError, RunError, ShardwrightError
from shardwright.train.config import TrainConfig
from shardwright.train.metrics import use_tensorboard
from shardwright.train.output import CHECKPOINTS, check_output
from shardwright.train.place import Place, place_from_environment
from shardwright.train.prepare import Say, digest, prepare
from shardwright.train.rank import device_of, device_type, process_group, train

_TAIL = 30
_LOGGERS = ("", ".agent.server.api", ".agent.server.local_elastic_agent", ".multiprocessing.errors")


def run(config: TrainConfig, environment: Mapping[str, str]) -> None:
    """The whole run. Whatever can be checked without ranks is checked before there are any.

    Args:
        environment: where torchrun or srun left this process's place; ``os.environ``.

    Raises:
        ShardwrightError: one paragraph, whichever rank it came from.
    """
    place = place_from_environment(environment)
    ranks = place.world_size if place else local_ranks(config)
    check_engine(config)
    check_devices(config, place.local_world_size if place else ranks)
    config.check_ranks(ranks)
    check_output(config.output, resume=bool(config.checkpoint.resume))
    use_tensorboard(config.output.tensorboard)
    with tempfile.TemporaryDirectory(prefix="shardwright-") as folder:
        job = Path(folder)
        if place is not None:
            device = device_of(config, place)
            with process_group(place, device):
                prepared = _prepare_once_per_machine(config, job, place)
                train(config, prepared, make_mesh(config.sharding, device.type))
            return
        prepare(config, job, _narrator(quiet=False))
        _start_ranks(ranks, job, config)


def local_ranks(config: TrainConfig) -> int:
    """How many ranks to start here: ``ranks``, else what the degrees ask for, else one for every GPU."""
    if config.ranks is not None:
        return config.ranks
    least = config.sharding.least_world_size
    on_gpu = config.device != "cpu" and default_device_type() == "cuda"
    return max(torch.cuda.device_count(), least) if on_gpu and config.sharding.dp_shard == -1 else least


def check_engine(config: TrainConfig) -> None:
    """Raises UnsupportedError for Megatron-FSDP without its package or a GPU, and for what it cannot do."""
    if config.sharding.engine == "megatron_fsdp":
        megatron_fsdp.check_config(config.sharding, device_type(config))


def check_devices(config: TrainConfig, local_world_size: int) -> None:
    """Raises ConfigError where a GPU is asked for and there is none, or not one for every rank."""
    count = torch.cuda.device_count()
    if config.device == "cuda" and count == 0:
        raise ConfigError("device is cuda, but torch finds no GPU here. Set device to auto or cpu.")
    if config.device != "cpu" and 0 < count < local_world_size:
        fitting = f"sharding.dp_shard={count} sharding.tp=1 sharding.sequence_parallel=false"
        raise ConfigError(
            f"{local_world_size} ranks on this machine need a GPU each, and it has {count}. Lower the degrees, for "
            f"example with {fitting}" + ("." if config.sharding.engine == "megatron_fsdp" else ", or set device=cpu.")
        )


def _prepare_once_per_machine(config: TrainConfig, job: Path, place: Place) -> Path:
    """The job folder of this machine, made by its first rank; an error there is raised on every rank."""
    made: tuple[str, str, str] | ShardwrightError | None = None
    if place.local_rank == 0:
        try:
            prepare(config, job, _narrator(quiet=place.rank != 0))
            made = (socket.gethostname(), str(job), digest(job))
        except ShardwrightError as error:
            made = error
    everyone: list[tuple[str, str, str] | ShardwrightError | None] = [None] * place.world_size
    dist.all_gather_object(everyone, made)
    for one in everyone:
        if isinstance(one, ShardwrightError):
            raise one
    folders = [one for one in everyone if isinstance(one, tuple)]
    if len({tokens for _, _, tokens in folders}) > 1:
        hosts = ", ".join(f"{host} ({tokens[:8]})" for host, _, tokens in folders)
        raise ConfigError(
            f"The machines prepared different data: {hosts}. They must see the same files, and the same tokenizer: put "
            "both on a shared disk."
        )
    return Path(next(folder for host, folder, _ in folders if host == socket.gethostname()))


def _narrator(quiet: bool) -> Say:
    console = Console(quiet=quiet)
    return lambda text: console.print(text, highlight=False, soft_wrap=True)


def _start_ranks(ranks: int, job: Path, config: TrainConfig) -> None:
    """Run ``ranks`` processes on this machine to their end, under torch's own launcher.

    Rank 0 has the terminal. What the others print, and what any rank writes to its standard error, goes to files; when
    a rank fails, the first cause is told once.
    """
    for part in _LOGGERS:  # each has a level of its own; what they tell is told below, in one paragraph
        logging.getLogger(f"torch.distributed.elastic{part}").setLevel(logging.CRITICAL)
    redirects = {rank: Std.ERR if rank == 0 else Std.ALL for rank in range(ranks)}
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(job / "logs"), redirects=redirects),
    )
    try:
        elastic_launch(launch, sys.executable)("-m", "shardwright.train.worker", str(job))
    except ChildFailedError as error:
        raise _cause(error, job) from None
    except SignalException as error:
        raise _stopped(error.sigval, ranks, config) from None


def _stopped(signal_: signal.Signals, ranks: int, config: TrainConfig) -> RunError:
    """What to say when this process was told to end and has ended the ranks, which had time to save a checkpoint."""
    what = f"Stopped by {signal_.name}; all {ranks} ranks have ended."
    saved = list_checkpoints(Path(config.output.dir) / CHECKPOINTS)
    if signal_ is not signal.SIGTERM or not saved:
        return RunError(what)
    return PreemptedError(f"{what} The same command with checkpoint.resume=true goes on from {saved[-1]}.")


def _cause(error: ChildFailedError, job: Path) -> ShardwrightError:
    """What a rank that refused has to say, since all ranks refuse alike; else the rank that failed first."""
    for failure in error.failures.values():
        report = failure.error_file_data["message"]
        kind, _, text = report["message"].partition(": ") if isinstance(report, dict) else ("", "", "")
        # Not by the exit code: torch 2.11 sometimes crashes in a rank that is about to end.
        if kind in _names(ShardwrightError):
            return PreemptedError(text) if kind in _names(PreemptedError) else RunError(text)
    rank, failure = min(error.failures.items(), key=lambda item: _time_of(item[1]))
    report = failure.error_file_data["message"]
    if not isinstance(report, dict):  # it was killed before it could say anything
        log = next((job / "logs").rglob(f"attempt_0/{rank}/stderr.log"))
        last_words = "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL:])
        return RunError(f"Rank {rank} died: {failure.message}. The end of its standard error:\n\n{last_words}")
    return RunError(f"Rank {rank} failed, and the run with it.\n\n{report['extraInfo']['py_callstack'].strip()}")


def _names(kind: type[ShardwrightError]) -> set[str]:
    """Of the class and of all that derive from it."""
    return {kind.__name__}.union(*map(_names, kind.__subclasses__()))


def _time_of(failure: ProcessFailure) -> float:
    """When it failed; the error file's own time stamp has whole seconds only."""
    file = Path(failure.error_file)
    return file.stat().st_mtime if file.is_file() else failure.timestamp
