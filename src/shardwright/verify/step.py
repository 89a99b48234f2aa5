"""A short training loop, written once: what the one-process reference and the ranks both run."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import nn

from shardwright.distributed.runtime.layout import whole
from shardwright.distributed.runtime.tiled_logits import TiledLogits

MAX_NORM = 0.1  # below the gradient norm of a fresh model, so that clipping does something
LEARNING_RATE = 0.1
# Adam divides by the size of the gradient: with torch's 1e-8 it would blow the rounding of a gradient that is zero in
# exact arithmetic (a key bias under softmax) up to a full step. After clipping, 1e-2 is a typical gradient.
EPS = 1e-2

Numbered = tuple[int, Mapping[str, Any]]
"""The number of a micro-batch and the keyword arguments of its forward."""


@dataclass
class Trace:
    """What the loop produced, as plain full tensors.

    Attributes:
        losses: one per recorded micro-batch of the first step.
        logits: of every evaluation and of the same micro-batches, in the order of the loop.
        gradients: of the first step by parameter name, before clipping; None where the parameter got none.
        norm: the total norm of the first step that ``torch.nn.utils.clip_grad_norm_`` returned.
        parameters: by name, after the last AdamW step.
    """

    losses: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    gradients: dict[str, torch.Tensor | None] = field(default_factory=dict)
    norm: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole value of a tensor, sharded or not, detached and copied."""
    with torch.no_grad():
        return whole(tensor).detach().clone()


def loss_of(output: Any) -> torch.Tensor:
    """The loss in what a model returned: the output itself, or its ``loss``."""
    return output if isinstance(output, torch.Tensor) else output["loss"]


def logits_of(output: Any) -> list[torch.Tensor]:
    """The logits in what a model returned, as a list of one or none; none where it computed them in tiles."""
    if isinstance(output, Mapping) and isinstance(output.get("logits"), TiledLogits):
        return []
    if isinstance(output, Mapping) and isinstance(output.get("logits"), torch.Tensor):
        return [full(output["logits"])]
    return []


def train(model: nn.Module, batches: Sequence[Numbered], own: int, *, logits_with_labels: bool = True) -> Trace:
    """The loop anyone would write: evaluate, accumulate, clip, step, evaluate, and a second step.

    An evaluation also stands between backward and clipping, where a trainer that logs may put one.

    Args:
        model: called with each batch as keyword arguments.
        batches: what this process sees, numbered: the number seeds what the model draws at random (LayerDrop).
        own: how many of the first of ``batches`` are recorded. In one process, those of the first data-parallel rank.
        logits_with_labels: whether calls with labels have logits to record; tiles of them cannot be.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, eps=EPS)
    trace = Trace(logits=evaluate(model, batches[0]))
    for place, output in enumerate(_passes(model, batches, seed=0)):
        if place < own:
            trace.losses.append(full(loss_of(output)))
            trace.logits += logits_of(output) if logits_with_labels else []
    trace.logits += evaluate(model, batches[0])
    trace.gradients = {name: None if p.grad is None else full(p.grad) for name, p in model.named_parameters()}
    trace.norm = _step(optimizer, trained)
    trace.logits += evaluate(model, batches[0])
    for _ in _passes(model, [batch for batch in batches if batch[0] % own == 0], seed=1000):
        pass  # one micro-batch of each data-parallel rank
    _step(optimizer, trained)
    trace.parameters = {name: full(parameter) for name, parameter in model.named_parameters()}
    return trace


def _passes(model: nn.Module, batches: Sequence[Numbered], seed: int) -> Iterator[Any]:
    """What ``model`` returns for each batch, after its backward."""
    for number, batch in batches:
        seed_all(seed + number)
        output = model(**batch)
        (loss_of(output) / len(batches)).backward()
        yield output


def _step(optimizer: torch.optim.Optimizer, trained: Sequence[nn.Parameter]) -> torch.Tensor:
    """Clip and step; the norm before clipping."""
    norm = full(torch.nn.utils.clip_grad_norm_(trained, MAX_NORM))
    optimizer.step()
    optimizer.zero_grad()
    return norm


def evaluate(model: nn.Module, batch: Numbered) -> list[torch.Tensor]:
    """The logits of a batch without labels and gradients, in evaluation mode; where there are none, the loss."""
    model.eval()
    with torch.no_grad():
        output = model(**without_labels(batch[1]))
    model.train()
    if found := logits_of(output):
        return found
    return [full(loss_of(output))] if isinstance(output, torch.Tensor) or "loss" in output else []


def without_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "labels"}


def seed_all(seed: int) -> None:
    """As ``transformers.set_seed``, with which accelerate and peft would be imported: four seconds in every rank."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
