"""The first step of a run against the same step of the unsharded model in one process."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from shardwright.distributed.precision import Precision
from shardwright.distributed.runtime.layout import whole
from shardwright.errors import ConfigError, ParityError
from shardwright.train.config import TrainConfig
from shardwright.train.dataset import IGNORE, TokenRows
from shardwright.train.loop import Trainer
from shardwright.train.model import build_whole_model
from shardwright.train.optim import make_optimizer
from shardwright.train.schedule import make_schedule
from shardwright.verify import compare
from shardwright.verify.compare import EXACT, gradient_scales, relative_error

# A gradient this small beside the norm of all gradients is float32 rounding noise: zero in exact arithmetic (the key
# bias of attention is the usual case). AdamW divides it by itself, so the weight it moves says nothing.
_NOISE = 1e-7


@dataclass(frozen=True)
class Difference:
    """Relative differences between the sharded step and one process, as :mod:`shardwright.verify` measures them.

    Attributes:
        loss: of the loss.
        gradient: the largest of any gradient, which is that of ``gradient_name``.
        weight: the largest of any updated weight, which is that of ``weight_name``.
        tensors: how many gradients were compared.
    """

    loss: float
    gradient: float
    gradient_name: str
    weight: float
    weight_name: str
    tensors: int

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.1e}, gradients {self.gradient:.1e} (worst of {self.tensors}: {self.gradient_name}), "
            f"updated weights {self.weight:.1e} (worst: {self.weight_name})"
        )


@dataclass(frozen=True)
class Reference:
    """A step of the unsharded model: mean loss, gradients before clipping and weights after the update, by name."""

    loss: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    gradient_norm: float


def require_float32(config: TrainConfig) -> None:
    """Raises ConfigError where "equal" would have no meaning: rounding hides a mistake below float32."""
    casts = config.sharding.precision.settled([config.model.dtype]) != Precision()
    if config.model.dtype != "float32" or casts:
        raise ConfigError(
            "check_first_step compares in float32, but model.dtype or sharding.precision is lower. Set both to "
            "float32 for a run that checks, then train without the check."
        )


def reference_step(config: TrainConfig, model_config: PreTrainedConfig, data: TokenRows, rows: np.ndarray) -> Reference:
    """The first step written down as plainly as possible: no mesh, no shards, one process on the CPU."""
    model = build_whole_model(config, model_config)
    optimizer = make_optimizer(model, config.optimizer)
    make_schedule(optimizer, config.schedule, config.optimizer.lr, config.steps)
    targets = data.targets(rows)
    loss = 0.0
    for part in rows.reshape(config.accumulation, -1):
        batch = data.batch(part)
        logits = model(**batch.inputs).logits
        share = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE, reduction="sum")
        (share / targets).backward()
        loss += share.item() / targets
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    norm = nn.utils.get_total_norm(list(gradients.values())).item()
    if config.clip_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    optimizer.step()
    return Reference(loss, gradients, {name: p.detach() for name, p in model.named_parameters()}, norm)


def checked_step(trainer: Trainer, rows: np.ndarray, reference: Reference | None) -> tuple[Tensor, Tensor, Difference]:
    """A training step like any other, compared with ``reference`` (rank 0 has it) on the way.

    Returns:
        The loss, the gradient norm and the difference, on every rank.

    Raises:
        ParityError: a difference above 1e-5, on every rank.
    """
    loss = trainer.backward(rows)
    gradients = _worst(trainer.model, reference, of_gradients=True)
    norm = trainer.update()
    weights = _worst(trainer.model, reference, of_gradients=False)
    found: list[Difference | None] = [None]
    if reference is not None:
        loss_error = abs(loss.item() - reference.loss) / abs(reference.loss)
        found = [Difference(loss_error, *gradients, *weights, len(reference.gradients))]
    dist.broadcast_object_list(found, src=0)
    difference = found[0]
    assert difference is not None, "rank 0 has a reference"
    errors = (difference.loss, difference.gradient, difference.weight)
    if not all(error < EXACT for error in errors):  # NaN fails, too
        raise ParityError(
            f"The first step differs from one process by more than {EXACT:.0e}: {difference}. Nothing was trained. "
            "Dropout makes the two differ; set it to 0 in the model's config. Otherwise this is a mistake in the "
            "parallel plan or in Shardwright: please report it with this config."
        )
    return loss, norm, difference


@torch.no_grad()
def _worst(model: nn.Module, reference: Reference | None, of_gradients: bool) -> tuple[float, str]:
    """The largest relative error and whose it is; gathers one tensor after the other, on every rank."""
    worst = compare.Difference(name="none")
    scales = gradient_scales({} if reference is None else reference.gradients)
    for name, parameter in model.named_parameters():
        tensor = parameter.grad if of_gradients else parameter
        full = None if tensor is None else whole(tensor).cpu()
        if reference is None:
            continue
        expected = reference.gradients.get(name)
        if full is None or expected is None:
            error = float("inf") if of_gradients and (full is None) != (expected is None) else 0.0
        elif of_gradients:
            error = relative_error(full, expected, scales[name])
        else:
            told = expected.abs() > _NOISE * reference.gradient_norm
            error = relative_error(full[told], reference.weights[name][told])
        worst.take(error, name)
    return worst.error, worst.name
