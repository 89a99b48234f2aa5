"""AdamW and the learning rate over the run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from shardwright.train.sections import OptimizerSettings, ScheduleSettings


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> AdamW:
    """AdamW over the parameters that train; weight decay on those with two dims or more."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW([g for g in groups if g["params"]], lr=settings.lr, betas=settings.betas, eps=settings.eps)


KEPT = frozenset({"step", "exp_avg", "exp_avg_sq"})  # what that AdamW keeps for every parameter


@dataclass
class Schedule:
    """The share of the full learning rate at every step; ``steps`` may be set later."""

    steps: int
    warmup_steps: int
    final_fraction: float

    def __call__(self, step: int) -> float:
        return rate(step, self.steps, self.warmup_steps, self.final_fraction)


def make_schedule(optimizer: AdamW, settings: ScheduleSettings, steps: int) -> LambdaLR:
    """Sets the rate of step 0 now and that of the next at every ``step()``.

    Args:
        steps: of the run, where the settings have none.
    """
    return LambdaLR(optimizer, Schedule(settings.steps or steps, settings.warmup_steps, settings.final_fraction))


def set_step(schedule: LambdaLR, step: int, steps: int) -> None:
    """Put ``schedule`` where it is after ``step`` steps of a schedule of ``steps``."""
    for function in schedule.lr_lambdas:
        assert isinstance(function, Schedule)
        function.steps = steps
    rates = [base * function(step) for base, function in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, value in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = value
    schedule.load_state_dict({**schedule.state_dict(), "last_epoch": step, "_last_lr": rates})


def rate(step: int, steps: int, warmup_steps: int, final_fraction: float) -> float:
    """The share of the full learning rate at ``step``, counted from 0.

    It rises to 1 at step ``warmup_steps`` in equal parts, the first of which is already above 0, and falls along half a
    cosine to ``final_fraction`` at the last step.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min((step - warmup_steps) / max(steps - 1 - warmup_steps, 1), 1.0)
    return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
