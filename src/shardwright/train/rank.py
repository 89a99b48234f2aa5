"""What one rank does, from the job folder to the saved model."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedConfig

from shardwright.checkpoint.adapters import save_adapter_folder
from shardwright.checkpoint.save import save_pretrained
from shardwright.checkpoint.together import same_error_everywhere
from shardwright.distributed.axes import NAMES
from shardwright.distributed.mesh import axis
from shardwright.distributed.runtime.layout import whole
from shardwright.errors import ConfigError, RunError
from shardwright.train.check import checked_step, reference_step
from shardwright.train.checkpointing import Checkpoints, first_not_finite, is_finite, require_equal_ranks
from shardwright.train.config import TrainConfig
from shardwright.train.dataset import Order, TokenRows
from shardwright.train.forecast import Forecast, beside
from shardwright.train.loop import Trainer
from shardwright.train.metrics import peak_memory_gib
from shardwright.train.model import build_model, model_config
from shardwright.train.optim import make_optimizer
from shardwright.train.output import MODEL, output_folder
from shardwright.train.prepare import TOKENIZER, VALIDATION
from shardwright.train.progress import ConsoleHandler, say, show_curve
from shardwright.train.recorder import Recorder
from shardwright.train.schedule import make_schedule
from shardwright.train.tokenizer import load_tokenizer
from shardwright.train.watchdog import Watchdog
from shardwright.untrusted import usable_path

log = logging.getLogger(__name__)


def train(config: TrainConfig, job: Path, mesh: DeviceMesh, watchdog: Watchdog | None = None) -> None:
    """Train in this rank; every rank calls this, inside :func:`shardwright.train.meeting.joined`.

    Args:
        mesh: what :func:`shardwright.distributed.mesh.make_mesh` makes of ``config.sharding``.
        job: the folder that :func:`shardwright.train.prepare.prepare` filled.
        watchdog: of this process; None: one that watches this call.

    Raises:
        ShardwrightError: the same on every rank; before anything is written where the config cannot work.
    """
    if watchdog is None:
        watchdog = Watchdog.of(config.rank_settings)
        with watchdog.watching():
            train(config, job, mesh, watchdog)
        return
    with ExitStack() as stack:
        with same_error_everywhere(f"Making {config.output.dir}"):
            if dist.get_rank() == 0:
                stack.enter_context(output_folder(config.output))
        _train(config, job, mesh, watchdog)


def _train(config: TrainConfig, job: Path, mesh: DeviceMesh, watchdog: Watchdog) -> None:
    watchdog.begin("building the model")
    console = _console()
    on_gpu = mesh.device_type == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device(mesh.device_type)
    tokenizer = load_tokenizer(str(job / TOKENIZER))
    architecture = model_config(config.model, tokenizer)
    data = TokenRows(job)
    order = Order(len(data), config.batch_size, config.data.validation, config.seed)
    require_equal_ranks(config)
    trainer = _trainer(config, architecture, mesh, data, device)
    say(console, _headline(trainer, mesh, device, config.sharding.sequence_parallel))

    # One stream of dropout for each data-parallel rank, the same on the ranks that share its rows.
    stream = np.random.SeedSequence([config.seed, axis(mesh, "dp").get_local_rank()])
    torch.manual_seed(int(stream.generate_state(1)[0]))
    checkpoints = Checkpoints(config, trainer, tokenizer, mesh, device)
    watchdog.begin("resuming")
    done = checkpoints.resume()
    if done:
        say(console, f"Resumed after step {done}.")
    first = None
    if config.check_first_step and not done:
        watchdog.begin("comparing the first step with one process")
        reference = reference_step(config, architecture, data, order.rows(0)) if dist.get_rank() == 0 else None
        loss, norm, difference = checked_step(trainer, order.rows(0), reference)
        first = (loss, norm)
        say(console, f"[green]The first step equals one process.[/] Relative differences: {difference}")
    with checkpoints.listening():
        held_out = data, order.held_out
        if config.data.validation_paths:
            there = TokenRows(job / VALIDATION)
            held_out = there, np.arange(len(there))
        recorded = _Steps(config, trainer, order, held_out, console, device, checkpoints, watchdog).take(done, first)
        watchdog.begin("waiting for the last checkpoint")

    watchdog.begin("saving the model")
    folder = usable_path(config.output.dir, "output.dir", ConfigError) / MODEL
    if config.lora.r:
        save_adapter_folder(trainer.model, folder, tokenizer)
    else:
        seconds = config.rank_settings.seconds_per_phase
        save_pretrained(trainer.model, folder, tokenizer, overwrite=True, timeout=seconds)
    checkpoints.finished()
    if recorded.losses:
        show_curve(console, recorded.losses)
    if (told := Forecast.read(job)) is not None:
        say(console, beside(told, recorded.speeds, peak_memory_gib(device), on_gpu))
    reader = "PeftModel" if config.lora.r else "AutoModelForCausalLM"
    say(console, f"Saved [bold]{escape(str(folder))}[/] for {reader}.from_pretrained.")


def _console() -> Console:
    """The terminal, for rank 0; the others stay silent. Shardwright's log goes to it too."""
    console = Console(quiet=dist.get_rank() != 0)
    log = logging.getLogger("shardwright")
    log.setLevel(logging.INFO if dist.get_rank() == 0 else logging.ERROR)
    log.handlers = [ConsoleHandler(console)]
    return console


def _trainer(
    config: TrainConfig, architecture: PreTrainedConfig, mesh: DeviceMesh, data: TokenRows, device: torch.device
) -> Trainer:
    model = build_model(config, architecture, mesh)
    optimizer = make_optimizer(model, config.optimizer)
    schedule = make_schedule(optimizer, config.schedule, config.optimizer.lr, config.steps)
    return Trainer(model, optimizer, schedule, mesh, data, device, config.accumulation, config.clip_norm)


def _headline(trainer: Trainer, mesh: DeviceMesh, device: torch.device, sequence_parallel: bool) -> str:
    parameters = sum(p.numel() for p in trainer.model.parameters())
    size = f"{parameters / 1e6:,.1f}M" if parameters >= 1e6 else f"{parameters:,}"
    axes = " x ".join(f"{name}={mesh[name].size()}" for name in NAMES if mesh[name].size() > 1) or "nothing sharded"
    name = type(trainer.model).__name__.removeprefix("FSDP")  # FSDP2 renames the class of what it shards
    return (
        f"{name}, {size} parameters, on {mesh.size()} {device.type} rank{'s' * (mesh.size() > 1)}: "
        f"{axes}{', sequence parallel' * sequence_parallel}"
    )


@dataclass
class _Steps:
    """The steps of a run, and what happens between them.

    Attributes:
        held_out: what the loss is measured on: rows of which data.
    """

    config: TrainConfig
    trainer: Trainer
    order: Order
    held_out: tuple[TokenRows, np.ndarray]
    console: Console
    device: torch.device
    checkpoints: Checkpoints
    watchdog: Watchdog

    def take(self, done: int, first: tuple[Tensor, Tensor] | None) -> Recorder:
        """The steps after the first ``done``; ``first`` is the loss and gradient norm of step 0 where that was taken.

        Returns what was recorded of them.
        """
        self.watchdog.begin("writing to output.dir")
        self.checkpoints.set_aside(done)
        with Recorder(self.config, self.console, self.device, done) as recorder:
            for step in range(done, self.config.steps):
                # The first may compile, and makes the optimizer's state.
                self.watchdog.begin(f"in step {step + 1}", step=step > done)
                lr = self.trainer.learning_rate
                taken = first if step == 0 and first is not None else self._step(step)
                if taken is None:
                    if self.config.not_finite == "stop":
                        self.checkpoints.stop(step)
                        break
                    self._save(step, None)
                    continue
                held_out = self._validate(step) if recorder.validates(step) else None
                recorder.record(step, *taken, lr, held_out)
                self._save(step, held_out)
        return recorder

    def _step(self, step: int) -> tuple[Tensor, Tensor] | None:
        """Loss and gradient norm; None where one is no number, so that there was no update."""
        loss, raw_norm = self.trainer.backward(self.order.rows(step)), self.trainer.gradient_norm()
        norm = whole(raw_norm)
        if is_finite(loss, norm):
            self.trainer.update(raw_norm)
            return loss, norm
        _not_finite(self.config, self.trainer, step, loss, norm)
        return None

    def _validate(self, step: int) -> float:
        self.watchdog.begin(f"evaluating after step {step + 1}")
        rows_at_once = self.config.batch_size // (self.config.accumulation * self.trainer.dp_size)
        return self.trainer.validate(*self.held_out, rows_at_once)

    def _save(self, step: int, held_out: float | None) -> None:
        self.watchdog.begin(f"saving a checkpoint after step {step + 1}")
        self.checkpoints.after(step, held_out)


def _not_finite(config: TrainConfig, trainer: Trainer, step: int, loss: Tensor, norm: Tensor) -> None:
    """Do what the config says about a step whose loss or gradient is no number.

    Raises:
        RunError: on every rank, where that ends the run; the weights are those of the step before.
    """
    name = first_not_finite(trainer.model)
    where = f" (first in the gradient of {name})" if name else ""
    what = (
        f"Step {step + 1} has loss {loss.item()} and gradient norm {norm.item()}{where} at a learning rate of "
        f"{trainer.learning_rate:.2e}."
    )
    if config.not_finite == "raise":
        raise RunError(
            f"{what} Training cannot go on from there. Lower optimizer.lr, raise schedule.warmup_steps, or lower "
            "clip_norm; or leave such steps out with not_finite=skip."
        )
    if config.not_finite == "stop":
        log.warning("%s The run ends here, with the weights after step %d.", what, step)
        return
    log.warning("%s It is left out.", what)
    trainer.leave_out()
