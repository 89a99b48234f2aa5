"""One training step, written once: what the one-process reference and the ranks both run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shardwright.distributed.runtime.layout import whole
from shardwright.distributed.runtime.tiled_logits import TiledLogits

MAX_NORM = 0.1  # below the gradient norm of a fresh model, so that clipping does something
LEARNING_RATE = 0.1
# Adam divides by the size of the gradient: with torch's 1e-8 it would blow the rounding of a gradient that is zero in
# exact arithmetic (a key bias under softmax) up to a full step. After clipping, 1e-2 is a typical gradient.
EPS = 1e-2


@dataclass
class Trace:
    """What a step produced, as plain full tensors.

    Attributes:
        losses: one per micro-batch.
        logits: one per micro-batch, then one more of the first micro-batch after the step, without labels and
            without gradients.
        gradients: by parameter name, before clipping; None where the parameter got none.
        norm: the total norm that ``torch.nn.utils.clip_grad_norm_`` returned.
        parameters: by name, after one AdamW step.
    """

    losses: list[torch.Tensor]
    logits: list[torch.Tensor]
    gradients: dict[str, torch.Tensor | None]
    norm: torch.Tensor
    parameters: dict[str, torch.Tensor]


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


def train_step(model: nn.Module, batches: Sequence[Mapping[str, Any]], micro_batches: int) -> Trace:
    """Accumulate over ``batches``, clip, step: the loop anyone would write.

    Args:
        model: called with each batch as keyword arguments.
        batches: what this process sees.
        micro_batches: what the losses are divided by: as many as one data-parallel rank sees, since data parallelism
            averages over its ranks by itself.
    """
    losses, logits = [], []
    for batch in batches:
        output = model(**batch)
        loss = loss_of(output)
        losses.append(full(loss))
        logits += logits_of(output)
        del output
        (loss / micro_batches).backward()
    gradients = {name: None if p.grad is None else full(p.grad) for name, p in model.named_parameters()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norm = full(torch.nn.utils.clip_grad_norm_(trainable, MAX_NORM))
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, eps=EPS)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        logits += logits_of(model(**without_labels(batches[0])))
    parameters = {name: full(parameter) for name, parameter in model.named_parameters()}
    return Trace(losses, logits, gradients, norm, parameters)


def without_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "labels"}
