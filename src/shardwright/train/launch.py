"""From one command to many ranks: local ones that it starts itself, or those torchrun or srun has started."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from shardwright.checkpoint.run_info import list_checkpoints
from shardwright.distributed.apply import megatron_fsdp
from shardwright.distributed.mesh import default_device_type, make_mesh
from shardwright.errors import ConfigError, PreemptedError, RunError, ShardwrightError, from_system
from shardwright.scratch import scratch_folder
from shardwright.train.config import JOB_CONFIG, TrainConfig, read_config
from shardwright.train.meeting import check_devices, device_type, joined
from shardwright.train.metrics import use_tensorboard
from shardwright.train.optim import check_optimizer
from shardwright.train.output import CHECKPOINTS, check_output
from shardwright.train.place import Place
from shardwright.train.prepare import Say, digest, prepare
from shardwright.train.rank import train
from shardwright.train.schedule import check_schedule
from shardwright.train.watchdog import Watchdog
from shardwright.untrusted import usable_path

_TAIL = 30
_RANKS, _RANKS_PER_CORE = 64, 4  # the most that are started on one machine, whatever its cores; and for each of them
_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_LOGGERS = ("", ".agent.server.api", ".agent.server.local_elastic_agent", ".multiprocessing.errors")


def run_on_local_ranks(config: TrainConfig) -> None:
    """The whole run, on ranks that are started here. Whatever can be checked without them is checked before.

    Raises:
        ShardwrightError: one paragraph, whichever rank it came from.
    """
    ranks = local_ranks(config)
    _check(config, ranks)
    check_devices(config, ranks)
    _require_cores(config, ranks)
    with scratch_folder() as job:
        prepare(config, job, _narrator(quiet=False))
        _start_ranks(ranks, job, config)


def run_here(config: TrainConfig, place: Place, watchdog: Watchdog) -> None:
    """The run as one of the ranks that a launcher has started. Raises ShardwrightError, the same on every rank."""
    _check(config, place.world_size)
    with joined(config, place, watchdog) as (located, device), ExitStack() as stack:
        job = stack.enter_context(scratch_folder()) if located.local_rank == 0 else None
        watchdog.begin("preparing the data, or waiting for it")
        prepared = _prepare_once_per_machine(config, job, located)
        settled = read_config(prepared / JOB_CONFIG)
        train(settled, prepared, make_mesh(config.sharding, device.type), watchdog)


def _check(config: TrainConfig, ranks: int) -> None:
    check_engine(config)
    config.check_ranks(ranks)
    check_output(config.output, config.checkpoint.resume)
    use_tensorboard(config.output.tensorboard)
    check_schedule(config.schedule, config.optimizer.lr, config.steps)
    check_optimizer(config.optimizer)


def _require_cores(config: TrainConfig, ranks: int) -> None:
    """Raises ConfigError for more processes than this machine could start."""
    most = max(_RANKS, _RANKS_PER_CORE * (os.cpu_count() or 1))
    if ranks > most:
        raise ConfigError(
            f"The config asks for {ranks:,} ranks on this machine, which has {os.cpu_count()} cores; {most} are the "
            "most that are started. Lower ranks or the degrees, or start ranks on more machines with torchrun or srun."
        )


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


def _prepare_once_per_machine(config: TrainConfig, job: Path | None, place: Place) -> Path:
    """The job folder of this machine, filled by its first rank; an error there is raised on every rank."""
    made: tuple[str, str, str] | ShardwrightError | None = None
    if job is not None:
        try:
            prepare(config, job, _narrator(quiet=place.rank != 0))
            made = (socket.gethostname(), str(job), digest(job))
        except (ShardwrightError, OSError, MemoryError) as error:
            made = error if isinstance(error, ShardwrightError) else from_system(error)
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
    # torch's launcher puts handlers of its own in the place of these. What is ignored, as under nohup, stays ignored.
    handlers = {number: signal.getsignal(number) for number in _HANDLED}
    handlers = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        signals_to_handle=",".join(number.name for number in handlers),
        logs_specs=DefaultLogsSpecs(log_dir=str(job / "logs"), redirects=redirects),
    )
    command = ("-P", "-m", "shardwright.train.worker", str(job), str(os.getpid()))  # -P: no code from this folder
    try:
        elastic_launch(launch, sys.executable)(*command)
    except ChildFailedError as error:
        raise _cause(error, job) from None
    except SignalException as error:
        raise _stopped(error.sigval, ranks, config) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _stopped(signal_: signal.Signals, ranks: int, config: TrainConfig) -> RunError:
    """What to say when this process was told to end and has ended the ranks, which had time to save a checkpoint."""
    what = f"Stopped by {signal_.name}; all {ranks} ranks have ended."
    saved = list_checkpoints(usable_path(config.output.dir, "output.dir", ConfigError) / CHECKPOINTS)
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
    if not isinstance(report, dict):  # it was killed before it could say anything, or the disk had no room for it
        log = next((job / "logs").rglob(f"attempt_0/{rank}/stderr.log"))
        last_words = "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL:])
        how = failure.message if failure.exitcode < 0 else f"its exit code is {failure.exitcode}"
        return RunError(f"Rank {rank} died: {how}. The end of its standard error:\n\n{last_words}")
    return RunError(f"Rank {rank} failed, and the run with it.\n\n{report['extraInfo']['py_callstack'].strip()}")


def _names(kind: type[ShardwrightError]) -> set[str]:
    """Of the class and of all that derive from it."""
    return {kind.__name__}.union(*map(_names, kind.__subclasses__()))


def _time_of(failure: ProcessFailure) -> float:
    """When it failed; the error file's own time stamp has whole seconds only."""
    file = Path(failure.error_file)
    return file.stat().st_mtime if file.is_file() else failure.timestamp
