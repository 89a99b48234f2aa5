"""The training step, and nothing else: forward, backward, clip, update."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from shardwright.distributed.mesh import axis
from shardwright.distributed.runtime.layout import whole
from shardwright.losses import call_with_loss
from shardwright.train.dataset import IGNORE, Batch, TokenRows, deal


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy of the next token in nats, summed over the targets of ``batch``: float32, 0-dim, differentiable."""

    def loss(output: Any) -> Tensor:
        logits, labels = output.logits.flatten(0, 1).float(), batch.labels.flatten()
        return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")

    return call_with_loss(model, loss, **batch.inputs)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The global norm of the gradients, 0-dim; a DTensor where they are."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


class Trainer:
    """One rank's part of the steps.

    The global batch of a step is the same at any mesh. Each data-parallel rank takes its share of it in
    ``accumulation`` micro-batches; the ranks of one tensor-parallel group read the same rows. The loss of a step is the
    sum over all targets of the global batch divided by their number, whatever way they are spread. FSDP averages
    gradients over the data-parallel ranks, so each rank's part is multiplied by how many there are.

    Args:
        mesh: what :func:`shardwright.distributed.mesh.make_mesh` returns.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: LambdaLR,
        mesh: DeviceMesh,
        data: TokenRows,
        device: torch.device,
        accumulation: int,
        clip_norm: float | None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedule
        self._dp = axis(mesh, "dp")
        self._data = data
        self._device = device
        self._accumulation = accumulation
        self._clip_norm = clip_norm

    @property
    def dp_size(self) -> int:
        """How many ranks the rows of a batch are dealt out to."""
        return self._dp.size()

    @property
    def learning_rate(self) -> float:
        """The rate that the next update uses."""
        return float(self.schedule.get_last_lr()[0])

    def backward(self, rows: np.ndarray) -> Tensor:
        """Leave the gradients of the batch ``rows`` in ``.grad``; returns its mean loss, the same on all ranks."""
        targets = self._data.targets(rows)
        total = torch.zeros((), device=self._device)
        for share in deal(rows, self._dp.get_local_rank(), self.dp_size, self._accumulation):
            loss = summed_loss(self.model, self._data.batch(share).to(self._device))
            (loss * (self.dp_size / targets)).backward()
            total += whole(loss.detach())
        dist.all_reduce(total, group=self._dp.get_group())
        return total / targets

    def gradient_norm(self) -> Tensor:
        """The global norm of the gradients that :meth:`backward` left, 0-dim."""
        return gradient_norm(self.model.parameters())

    def update(self, norm: Tensor | None = None) -> Tensor:
        """Clip, step the optimizer and the learning rate, clear the gradients; returns the gradient norm, 0-dim.

        Args:
            norm: what :meth:`gradient_norm` returned, where it is known.
        """
        norm = self.gradient_norm() if norm is None else norm
        if self._clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self._clip_norm, norm)
        self.optimizer.step()
        self.leave_out()
        return whole(norm)

    def leave_out(self) -> None:
        """Go on to the next step without an update from the gradients there are."""
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def validate(self, data: TokenRows, rows: np.ndarray, rows_at_once: int) -> float:
        """Mean loss over ``rows`` of ``data``, each rank measuring its share.

        Args:
            rows_at_once: rows per forward of one rank.
        """
        self.model.eval()
        group = rows_at_once * self.dp_size
        padded = np.pad(rows, (0, -len(rows) % group), constant_values=-1)  # every rank takes part in every forward
        total = torch.zeros((), device=self._device)
        for part in padded.reshape(-1, self.dp_size, rows_at_once):
            batch = data.batch(part[self._dp.get_local_rank()])
            total += whole(summed_loss(self.model, batch.to(self._device)))
        dist.all_reduce(total, group=self._dp.get_group())
        self.model.train()
        return total.item() / data.targets(rows)
