"""What one rank does, from the job folder to the saved model."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedConfig

from shardwright.checkpoint.save import save_pretrained
from shardwright.distributed.axes import NAMES
from shardwright.distributed.mesh import axis, default_device_type
from shardwright.distributed.runtime.layout import whole
from shardwright.errors import RunError
from shardwright.train.check import checked_step, reference_step
from shardwright.train.checkpointing import Checkpoints, first_not_finite, is_finite, require_equal_ranks
from shardwright.train.config import TrainConfig
from shardwright.train.dataset import Order, TokenRows
from shardwright.train.loop import Trainer
from shardwright.train.model import build_model, model_config
from shardwright.train.optim import make_optimizer, make_schedule
from shardwright.train.output import MODEL
from shardwright.train.place import Place
from shardwright.train.prepare import TOKENIZER
from shardwright.train.progress import ConsoleHandler, show_curve
from shardwright.train.recorder import Recorder
from shardwright.train.tokenizer import load_tokenizer
from shardwright.train.watchdog import Watchdog

log = logging.getLogger(__name__)


def device_type(config: TrainConfig) -> str:
    """``"cuda"`` or ``"cpu"``: what the ranks of this run compute on."""
    return default_device_type() if config.device == "auto" else config.device


def device_of(config: TrainConfig, place: Place) -> torch.device:
    """The device of a rank: its own GPU, or the CPU."""
    kind = device_type(config)
    return torch.device(kind, place.local_rank) if kind == "cuda" else torch.device(kind)


@contextmanager
def process_group(place: Place, device: torch.device) -> Iterator[None]:
    """The ranks joined: NCCL between GPUs (gloo for objects on the CPU), gloo otherwise; cores shared out evenly."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max((os.cpu_count() or 1) // place.local_world_size, 1))
    store, _, _ = next(dist.rendezvous(place.init_method, place.rank, place.world_size))
    if place.world_size == place.local_world_size:
        # torchrun keeps one store over its restarts, with the addresses of the ranks that were killed still in it. The
        # machines of a larger job may count their restarts differently, so there is no common prefix there.
        store = dist.PrefixStore(f"attempt-{place.attempt}", store)
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.world_size,
        device_id=device if on_gpu else None,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def train(config: TrainConfig, job: Path, mesh: DeviceMesh) -> None:
    """Train in this rank; every rank calls this, inside :func:`process_group`.

    Args:
        mesh: what :func:`shardwright.distributed.mesh.make_mesh` makes of ``config.sharding``.
        job: the folder that :func:`shardwright.train.prepare.prepare` filled.

    Raises:
        ShardwrightError: the same on every rank; before anything is written where the config cannot work.
    """
    console = _console()
    on_gpu = mesh.device_type == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device(mesh.device_type)
    tokenizer = load_tokenizer(str(job / TOKENIZER))
    architecture = model_config(config.model, tokenizer)
    data = TokenRows(job)
    order = Order(len(data), config.batch_size, config.data.validation, config.seed)
    require_equal_ranks(config)
    trainer = _trainer(config, architecture, mesh, data, device)
    _say(console, _headline(trainer, mesh, device, config.sharding.sequence_parallel))

    # One stream of dropout for each data-parallel rank, the same on the ranks that share its rows.
    stream = np.random.SeedSequence([config.seed, axis(mesh, "dp").get_local_rank()])
    torch.manual_seed(int(stream.generate_state(1)[0]))
    checkpoints = Checkpoints(config, trainer, tokenizer, mesh, device)
    done = checkpoints.resume()
    if done:
        _say(console, f"Resumed after step {done}.")
    first = None
    if config.check_first_step and not done:
        reference = reference_step(config, architecture, data, order.rows(0)) if dist.get_rank() == 0 else None
        *first, difference = checked_step(trainer, order.rows(0), reference)
        _say(console, f"[green]The first step equals one process.[/] Relative differences: {difference}")
    with checkpoints.listening():
        losses = _train_all(config, trainer, order, console, device, tuple(first) if first else None, checkpoints, done)

    folder = Path(config.output.dir) / MODEL
    save_pretrained(trainer.model, folder, tokenizer)
    if losses:
        show_curve(console, losses)
    _say(console, f"Saved [bold]{folder}[/] for AutoModelForCausalLM.from_pretrained.")


def _console() -> Console:
    """The terminal, for rank 0; the others stay silent. Shardwright's log goes to it too."""
    console = Console(quiet=dist.get_rank() != 0)
    log = logging.getLogger("shardwright")
    log.setLevel(logging.INFO if dist.get_rank() == 0 else logging.ERROR)
    log.handlers = [ConsoleHandler(console)]
    return console


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


def _trainer(
    config: TrainConfig, architecture: PreTrainedConfig, mesh: DeviceMesh, data: TokenRows, device: torch.device
) -> Trainer:
    model = build_model(config.model, architecture, config.seed, config.sharding, mesh)
    optimizer = make_optimizer(model, config.optimizer)
    schedule = make_schedule(optimizer, config.schedule, config.steps)
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


def _train_all(
    config: TrainConfig,
    trainer: Trainer,
    order: Order,
    console: Console,
    device: torch.device,
    first: tuple[torch.Tensor, ...] | None,
    checkpoints: Checkpoints,
    done: int,
) -> list[float]:
    """The steps after the first ``done``; ``first`` is the loss and gradient norm of step 0 where that has been taken.

    Returns the losses of all recorded steps.
    """
    rows_at_once = config.batch_size // (config.accumulation * trainer.dp_size)
    watchdog = Watchdog(config.step_timeout)
    with Recorder(config, console, device, done) as recorder, watchdog.watching():
        for step in range(done, config.steps):
            watchdog.beat(step)
            lr = trainer.learning_rate
            if step == 0 and first is not None:
                loss, norm = first
            else:
                loss, raw_norm = trainer.backward(order.rows(step)), trainer.gradient_norm()
                norm = whole(raw_norm)
                if not is_finite(loss, norm):
                    if not _goes_on(config, trainer, step, loss, norm):
                        checkpoints.stop(step)
                        break
                    checkpoints.after(step, None)
                    continue
                trainer.update(raw_norm)
            held_out = None
            if recorder.validates(step):
                held_out = trainer.validate(order.held_out, rows_at_once)
            recorder.record(step, loss, norm, lr, held_out)
            checkpoints.after(step, held_out)
    return recorder.losses


def _goes_on(config: TrainConfig, trainer: Trainer, step: int, loss: torch.Tensor, norm: torch.Tensor) -> bool:
    """Do what the config says about a step whose loss or gradient is no number; returns whether there is a next step.

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
        return False
    log.warning("%s It is left out.", what)
    trainer.leave_out()
    return True
