"""The learning rate over the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches

import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from shardwright.errors import ConfigError
from shardwright.train.sections import ScheduleSettings
from shardwright.untrusted import ToldAs, shown

_BY_METRICS = ("reduce_lr_on_plateau", "greedy")  # the rate follows from losses, not from steps


@dataclass
class Schedule:
    """The share of the full learning rate at every step; ``steps`` may be set later."""

    settings: ScheduleSettings
    lr: float
    steps: int
    _made: tuple[int, Callable[[int], float]] | None = field(default=None, repr=False)

    def __call__(self, step: int) -> float:
        if self.settings.name is None:
            return rate(step, self.steps, self.settings.warmup_steps, self.settings.final_fraction)
        if self._made is None or self._made[0] != self.steps:
            self._made = (self.steps, _of_transformers(self.settings, self.lr, self.steps))
        return float(self._made[1](step))


def _of_transformers(settings: ScheduleSettings, lr: float, steps: int) -> Callable[[int], float]:
    """The function of a schedule that transformers has.

    Raises:
        ConfigError: it has none of this name, or the arguments do not fit.
    """
    from transformers import SchedulerType, get_scheduler  # with them comes accelerate, which most runs do not need

    known = [one.value for one in SchedulerType if one.value not in _BY_METRICS]
    if settings.name not in known:
        near = get_close_matches(str(settings.name), known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known here: {', '.join(known)}."
        raise ConfigError(
            f"schedule.name is {shown(settings.name)}, which is no schedule of transformers by steps. {hint}"
        )
    stand_in = SGD([torch.zeros(1)], lr=lr)
    with ToldAs(ConfigError, f"transformers refuses the schedule {settings.name} with schedule.options"):
        made = get_scheduler(settings.name, stand_in, settings.warmup_steps, steps, dict(settings.options))
        function: Callable[[int], float] = made.lr_lambdas[0]
        for step in (0, settings.warmup_steps, steps):
            function(step)
    return function


def check_schedule(settings: ScheduleSettings, lr: float, steps: int) -> None:
    """Raises ConfigError for a schedule that there is not, or arguments that it does not take."""
    Schedule(settings, lr, settings.steps or steps)(0)


def make_schedule(optimizer: Optimizer, settings: ScheduleSettings, lr: float, steps: int) -> LambdaLR:
    """Sets the rate of step 0 now and that of the next at every ``step()``.

    Args:
        lr: the full rate.
        steps: of the run, where the settings have none.
    """
    return LambdaLR(optimizer, Schedule(settings, lr, settings.steps or steps))


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
