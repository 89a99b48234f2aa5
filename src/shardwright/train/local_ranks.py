"""From one command to ranks on this machine, each a process of its own, under torch's own launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from uuid import uuid4

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from shardwright.errors import ConfigError, PreemptedError, RunError, ShardwrightError
from shardwright.train.meeting import check_devices
from shardwright.train.rank_settings import RankSettings

_TAIL = 30
_RANKS, _RANKS_PER_CORE = 64, 4  # the most that are started on one machine, whatever its cores; and for each of them
_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_LOGGERS = ("", ".agent.server.api", ".agent.server.local_elastic_agent", ".multiprocessing.errors")


def local_ranks(settings: RankSettings) -> int:
    """How many ranks to start here: ``ranks``, else what the degrees ask for, else one for every GPU."""
    known = settings.known_ranks
    return max(torch.cuda.device_count(), settings.sharding.least_world_size) if known is None else known


def check_machine(settings: RankSettings, ranks: int) -> None:
    """Raises ConfigError where this machine cannot have so many ranks: for want of GPUs, or of cores."""
    check_devices(settings, ranks)
    most = max(_RANKS, _RANKS_PER_CORE * (os.cpu_count() or 1))
    if ranks > most:
        raise ConfigError(
            f"The config asks for {ranks:,} ranks on this machine, which has {os.cpu_count()} cores; {most} are the "
            "most that are started. Lower ranks or the degrees, or start ranks on more machines with torchrun or srun."
        )


def start_ranks(ranks: int, job: Path, module: str) -> None:
    """Run ``ranks`` processes on this machine to their end, under torch's own launcher.

    Rank 0 has the terminal. What the others print, and what any rank writes to its standard error, goes to files; when
    a rank fails, the first cause is told once.

    Args:
        job: the folder that all of them read.
        module: run by each, with ``job`` and the id of this process as its arguments.

    Raises:
        ShardwrightError: what the ranks refused, or how the first of them died.
        torch.distributed.elastic.multiprocessing.SignalException: this process was told to end, and has ended them.
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
    command = ("-P", "-m", module, str(job), str(os.getpid()))  # -P: no code from this folder
    try:
        elastic_launch(launch, sys.executable)(*command)
    except ChildFailedError as error:
        raise _cause(error, job) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


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
