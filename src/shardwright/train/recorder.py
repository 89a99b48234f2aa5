"""Turns steps into lines of metrics, for the files and for the screen."""

from __future__ import annotations

import time
from contextlib import ExitStack
from types import TracebackType

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from shardwright.checkpoint.together import same_error_everywhere
from shardwright.train.config import TrainConfig
from shardwright.train.metrics import Metrics, MetricsFiles, peak_memory_gib, use_tensorboard
from shardwright.train.output import start_output
from shardwright.train.progress import ProgressBar


class Recorder:
    """Records the steps of a run; a context manager. Every rank has one, and only rank 0's writes and shows.

    Attributes:
        losses: the loss of every recorded step.
        speeds: tokens a second on all ranks, of the recorded steps but the first, which may compile.

    Args:
        done: steps that a resumed run has behind it.
    """

    def __init__(self, config: TrainConfig, console: Console, device: torch.device, done: int = 0) -> None:
        self.losses: list[float] = []
        self.speeds: list[float] = []
        self._config = config
        self._console = console
        self._device = device
        self._done = done
        self._tokens_per_step = config.batch_size * config.data.sequence_length
        self._stack = ExitStack()

    def __enter__(self) -> Recorder:
        self._files: MetricsFiles | None = None
        with same_error_everywhere(f"Writing to {self._config.output.dir}"):
            if dist.get_rank() == 0:
                output = self._config.output
                folder = start_output(output, self._config.to_yaml(), resumed=self._done > 0)
                files = MetricsFiles(folder, use_tensorboard(output.tensorboard), self._done)
                self._files = self._stack.enter_context(files)
                self.losses = files.losses
                self._progress = self._stack.enter_context(ProgressBar(self._console, self._config.steps))
        self._last_step, self._last_time = self._done, time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def validates(self, step: int) -> bool:
        """Whether the loss is measured on what is held out after ``step`` (from 0)."""
        if not self._config.data.validates:
            return False
        every = self._config.output.validate_every
        return self._is_last(step) or (every > 0 and (step + 1) % every == 0)

    def record(self, step: int, loss: Tensor, norm: Tensor, lr: float, validation_loss: float | None) -> None:
        """Take note of ``step`` (from 0), where one is due."""
        due = (step + 1) % self._config.output.log_every == 0 or self._is_last(step) or step == 0
        if not due and validation_loss is None:
            return
        values = loss.item(), norm.item()  # waits for the device, so the time below is that of finished work
        self.losses.append(values[0])
        now, done = time.perf_counter(), step + 1
        speed = None  # a first step that was checked was taken before the clock started
        if step > 0 or not self._config.check_first_step:
            speed = (done - self._last_step) * self._tokens_per_step / (now - self._last_time)
        if speed is not None and self._last_step > self._done:
            self.speeds.append(speed)
        self._last_step, self._last_time = done, now
        memory = peak_memory_gib(self._device)
        self._show(Metrics(done, *values, lr, speed, memory, done * self._tokens_per_step, validation_loss))

    def _is_last(self, step: int) -> bool:
        return step + 1 == self._config.steps

    def _show(self, metrics: Metrics) -> None:
        if self._files is not None:
            self._files.write(metrics)
            self._progress.show(metrics)
