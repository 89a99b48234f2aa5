"""Checkpoints of a run: when they are made, where a run goes on, and what ends it early."""

from __future__ import annotations

import hashlib
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

import shardwright
from shardwright.checkpoint.run_info import RunInfo, find_checkpoint
from shardwright.checkpoint.state import RunState
from shardwright.checkpoint.store import (
    CheckpointStore,
    latest_checkpoint,
    load_checkpoint,
    remove_set_aside,
    set_aside,
)
from shardwright.checkpoint.together import from_all, same_error_everywhere
from shardwright.distributed.axes import NAMES
from shardwright.errors import CheckpointError, ConfigError, PreemptedError, ShardwrightError
from shardwright.train.config import TrainConfig
from shardwright.train.loop import Trainer
from shardwright.train.optim import arguments, kept
from shardwright.train.output import CHECKPOINTS
from shardwright.train.schedule import set_step
from shardwright.untrusted import shown, usable_path

log = logging.getLogger(__name__)


class Checkpoints:
    """One rank's part in saving and resuming; a context manager, inside which SIGTERM is listened to.

    Making one is a collective.
    """

    def __init__(
        self,
        config: TrainConfig,
        trainer: Trainer,
        tokenizer: PreTrainedTokenizerBase,
        mesh: DeviceMesh,
        device: torch.device,
    ) -> None:
        self._config = config
        self._trainer = trainer
        self._state = RunState(
            trainer.model, trainer.optimizer, trainer.schedule, kept(config.optimizer), trained_only=config.lora.r > 0
        )
        self._schedule_steps = config.schedule.steps or config.steps
        self._device = device
        self._degrees = " x ".join(f"{axis}={mesh[axis].size()}" for axis in NAMES)
        self._folder = usable_path(config.output.dir, "output.dir", ConfigError) / CHECKPOINTS
        self._asked_to_stop = False
        self._saved_step = 0
        self._store: CheckpointStore | None = None
        if config.checkpoint.every:
            self._store = CheckpointStore(self._folder, trainer.model, tokenizer, keep_last=config.checkpoint.keep)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, SIGTERM is noted; :meth:`after` acts on it at the end of the step. The last save is waited for.

        Where another program runs this in a thread (a worker of Ray's does), signals are that program's.
        """
        hears = self._store is not None and threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, self._note) if hears else None
        try:
            yield
        except ShardwrightError:  # every rank has it, so the save under way can still be finished together
            self._wait()
            raise
        else:
            self._wait()
        finally:
            if hears:
                signal.signal(signal.SIGTERM, before)

    def resume(self) -> int:
        """Put the newest checkpoint (or the one that the config names) back; returns the steps it has behind it.

        Raises:
            CheckpointError: it is damaged, or of another model; on every rank.
        """
        wanted = self._config.checkpoint.resume
        folder: Path | None
        if isinstance(wanted, str):
            folder = find_checkpoint(usable_path(wanted, "checkpoint.resume", ConfigError))
        else:
            folder = latest_checkpoint(self._folder) if wanted else None
        if folder is None:
            return 0
        settings = ["initial_lr", *(key for key in arguments(self._config.optimizer) if key != "lr")]
        mine = [{key: group[key] for key in settings if key in group} for group in self._trainer.optimizer.param_groups]
        rates: list[Any] = list(self._trainer.schedule.base_lrs)
        info = load_checkpoint(folder, self._state)
        if info.step > self._config.steps:
            raise ConfigError(f"{folder} is of step {info.step}, but the run has only {self._config.steps} steps.")
        self._schedule_steps = self._config.schedule.steps or _schedule_steps(info, folder) or self._config.steps
        self._keep_settings(mine, rates, info.step)
        self._saved_step = info.step
        return info.step

    def set_aside(self, done: int) -> None:
        """Take checkpoints of steps after ``done`` out of the way: they belong to what this run does not go on with.

        They go when the first new checkpoint is whole. Collective.
        """
        with same_error_everywhere(f"Moving checkpoints in {self._folder}"):
            moved = set_aside(self._folder, done) if dist.get_rank() == 0 else []
        if moved:
            log.warning("Set aside until there is a new checkpoint: %s", ", ".join(map(str, moved)))

    def _keep_settings(self, mine: list[dict[str, Any]], rates: list[Any], step: int) -> None:
        """What the config says about the optimizer holds, and not what the checkpoint says; the schedule goes on."""
        groups = self._trainer.optimizer.param_groups
        for group, settings in zip(groups, mine, strict=True):
            changed = [f"{key} {group[key]} -> {value}" for key, value in settings.items() if group[key] != value]
            if changed:
                log.warning("The config has other settings than the checkpoint: %s.", ", ".join(changed))
            group.update(settings)
        self._trainer.schedule.base_lrs = rates
        set_step(self._trainer.schedule, step, self._schedule_steps)
        if self._schedule_steps != (self._config.schedule.steps or self._config.steps):
            log.warning(
                "The learning rate keeps to the %d steps that the run began with; schedule.steps sets others.",
                self._schedule_steps,
            )

    def after(self, step: int, metric: float | None) -> None:
        """Called by every rank after ``step`` (from 0): save where it is due, or where SIGTERM asks for it.

        Raises:
            PreemptedError: SIGTERM has come to some rank, and the checkpoint is on the disk.
            CheckpointError: the save before could not be written.
        """
        if self._store is None:
            return
        done = step + 1
        asked = torch.tensor(int(self._asked_to_stop), device=self._device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        stop = bool(asked.item())
        if stop or done % self._config.checkpoint.every == 0 or done == self._config.steps:
            self._save(self._store, done, metric, wait=stop)
        if stop:
            raise PreemptedError(
                f"Stopped by SIGTERM after step {done}; {self._folder} has its checkpoint. The same command with "
                "checkpoint.resume=true goes on from there."
            )

    def stop(self, done: int) -> None:
        """The run ends early, with ``done`` steps behind it: save them, and wait until they are on the disk."""
        if self._store is not None and done:
            self._save(self._store, done, None, wait=True)

    def finished(self) -> None:
        """The run has ended as it should: what was set aside is replaced, with a checkpoint or without. Collective."""
        with same_error_everywhere(f"Removing what was set aside in {self._folder}"):
            if dist.get_rank() == 0 and self._folder.is_dir():
                remove_set_aside(self._folder)

    def _save(self, store: CheckpointStore, done: int, metric: float | None, wait: bool) -> None:
        if done != self._saved_step:
            progress = {"data_step": done, "schedule_steps": self._schedule_steps}
            store.save(self._state, done, progress, metric=metric, notes={"mesh": self._degrees}, wait=wait)
            self._saved_step = done
        elif wait:
            store.wait()

    def _wait(self) -> None:
        if self._store is not None:
            self._store.wait()

    def _note(self, _: int, __: FrameType | None) -> None:
        self._asked_to_stop = True


def _schedule_steps(info: RunInfo, folder: Path) -> int | None:
    """The steps of the schedule that the run began with; None where a checkpoint does not say."""
    steps = info.progress.get("schedule_steps")
    if steps is not None and (type(steps) is not int or not 1 <= steps < 2**53):
        raise CheckpointError(f"schedule_steps in {folder} is {shown(steps)}; it must be a number of steps.")
    if info.progress.get("data_step") != info.step:
        raise CheckpointError(f"data_step in {folder} is {shown(info.progress.get('data_step'))}, not {info.step}.")
    return steps


def first_not_finite(model: torch.nn.Module) -> str | None:
    """The name of the first parameter whose gradient is not finite on some rank; the same answer on every rank."""
    mine = None
    for number, (name, parameter) in enumerate(model.named_parameters()):
        gradient = parameter.grad
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        if local is not None and not bool(torch.isfinite(local).all()):
            mine = (number, name)
            break
    found = [one for one in from_all(mine) if one is not None]
    return min(found)[1] if found else None


def is_finite(*values: Tensor) -> bool:
    """Whether all of these (0-dim, equal on all ranks) are finite; waits for the device."""
    return bool(torch.isfinite(torch.stack([value.detach().float() for value in values])).all())


def require_equal_ranks(config: TrainConfig) -> None:
    """Before anything is built: every rank has this config, this code and these versions.

    Raises:
        ConfigError: on every rank, naming what differs and where.
    """
    mine: dict[str, Any] = {
        "config": hashlib.sha256(config.to_yaml().encode()).hexdigest()[:12],
        "code of Shardwright": _code_digest(),
        "Shardwright": shardwright.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    everyone = from_all(mine)
    for rank, theirs in enumerate(everyone):
        for what, value in everyone[0].items():
            if theirs[what] != value:
                raise ConfigError(
                    f"Rank {rank} has {what} {theirs[what]}, but rank 0 has {value}. All ranks must run the same: give "
                    "every machine the same files and environment."
                )


def _code_digest() -> str:
    folder = Path(shardwright.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:12]
