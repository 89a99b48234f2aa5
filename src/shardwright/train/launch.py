"""From one command to many ranks: local ones that it starts itself, or those torchrun or srun has started."""

from __future__ import annotations

import signal
import socket
from contextlib import ExitStack
from pathlib import Path

import torch.distributed as dist
from rich.console import Console
from torch.distributed.elastic.multiprocessing import SignalException

from shardwright.checkpoint.run_info import list_checkpoints
from shardwright.distributed.apply import megatron_fsdp
from shardwright.distributed.mesh import make_mesh
from shardwright.errors import ConfigError, PreemptedError, RunError, ShardwrightError, from_system
from shardwright.scratch import scratch_folder
from shardwright.train.config import JOB_CONFIG, TrainConfig, read_config
from shardwright.train.forecast import forecast
from shardwright.train.local_ranks import check_machine, local_ranks, start_ranks
from shardwright.train.meeting import device_type, joined
from shardwright.train.metrics import use_tensorboard
from shardwright.train.optim import check_optimizer
from shardwright.train.output import CHECKPOINTS
from shardwright.train.place import Place
from shardwright.train.prepare import Say, digest, prepare
from shardwright.train.progress import say
from shardwright.train.pulse import pulse
from shardwright.train.rank import train
from shardwright.train.schedule import check_schedule
from shardwright.train.watchdog import Watchdog
from shardwright.untrusted import usable_path


def run_on_local_ranks(config: TrainConfig) -> None:
    """The whole run, on ranks that are started here. Whatever can be checked without them is checked before.

    Raises:
        ShardwrightError: one paragraph, whichever rank it came from.
    """
    ranks = local_ranks(config.rank_settings)
    _check(config, ranks)
    check_machine(config.rank_settings, ranks)
    with scratch_folder() as job:
        narrator = _narrator(quiet=False)
        with pulse(lambda: "preparing the data"):
            prepare(config, job, narrator)
        with pulse(lambda: "estimating a step"):
            forecast(config, job, ranks, narrator)
        try:
            start_ranks(ranks, job, "shardwright.train.worker")
        except SignalException as error:
            raise _stopped(error.sigval, ranks, config) from None


def run_here(config: TrainConfig, place: Place, watchdog: Watchdog) -> None:
    """The run as one of the ranks that a launcher has started. Raises ShardwrightError, the same on every rank."""
    _check(config, place.world_size)
    with joined(config.rank_settings, place, watchdog) as (located, device), ExitStack() as stack:
        job = stack.enter_context(scratch_folder()) if located.local_rank == 0 else None
        watchdog.begin("preparing the data, or waiting for it")
        prepared = _prepare_once_per_machine(config, job, located)
        settled = read_config(prepared / JOB_CONFIG)
        train(settled, prepared, make_mesh(config.sharding, device.type), watchdog)


def _check(config: TrainConfig, ranks: int) -> None:
    check_engine(config)
    config.check_ranks(ranks)
    use_tensorboard(config.output.tensorboard)
    check_schedule(config.schedule, config.optimizer.lr, config.steps)
    check_optimizer(config.optimizer)


def check_engine(config: TrainConfig) -> None:
    """Raises UnsupportedError for Megatron-FSDP without its package or a GPU, and for what it cannot do."""
    if config.sharding.engine == "megatron_fsdp":
        megatron_fsdp.check_config(config.sharding, device_type(config.rank_settings))


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
    return lambda text: say(console, text)


def _stopped(signal_: signal.Signals, ranks: int, config: TrainConfig) -> RunError:
    """What to say when this process was told to end and has ended the ranks, which had time to save a checkpoint."""
    what = f"Stopped by {signal_.name}; all {ranks} ranks have ended."
    saved = list_checkpoints(usable_path(config.output.dir, "output.dir", ConfigError) / CHECKPOINTS)
    if signal_ is not signal.SIGTERM or not saved:
        return RunError(what)
    return PreemptedError(f"{what} The same command with checkpoint.resume=true goes on from {saved[-1]}.")
