"""The optimizer of a run, by name."""

from __future__ import annotations

import inspect
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from shardwright.distributed.runtime.optimizers import require_shardable
from shardwright.errors import ConfigError, UnsupportedError
from shardwright.train.sections import OptimizerSettings
from shardwright.untrusted import ToldAs, shown

_FEW = ("betas", "eps", "weight_decay")  # settings that not every optimizer has
_CLOSURES = (torch.optim.LBFGS, torch.optim.SparseAdam)  # it takes the loss as a function; it takes sparse gradients


def kept(settings: OptimizerSettings) -> frozenset[str] | None:
    """What the optimizer keeps for every parameter; None where that is not known."""
    known = optimizer_class(settings) is AdamW and not settings.options
    return frozenset({"step", "exp_avg", "exp_avg_sq"}) if known else None


def optimizer_class(settings: OptimizerSettings) -> type[Optimizer]:
    """The class that ``settings.name`` says.

    Raises:
        ConfigError: there is none of this name.
        UnsupportedError: it does not work on sharded parameters, or not in this loop.
    """
    module, dot, name = settings.name.rpartition(".")
    if dot:
        with ToldAs(ConfigError, f"optimizer.name is {shown(settings.name)}, which cannot be imported"):
            found: Any = vars(import_module(module))[name]
        if not isinstance(found, type) or not issubclass(found, Optimizer):
            raise ConfigError(f"optimizer.name is {shown(settings.name)}, which is no class of optimizers.")
    else:
        classes = {key.lower(): value for key, value in vars(torch.optim).items() if isinstance(value, type)}
        known = {key: cls for key, cls in classes.items() if issubclass(cls, Optimizer) and cls is not Optimizer}
        if name.lower() not in known:
            near = get_close_matches(name.lower(), known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"It has {', '.join(sorted(known))}."
            raise ConfigError(f"optimizer.name is {shown(name)}, which torch.optim does not have. {hint}")
        found = known[name.lower()]
    require_shardable(found)
    if issubclass(found, _CLOSURES):
        raise UnsupportedError(f"optimizer.name is {settings.name}, which this training loop cannot run. Use adamw.")
    return found


def arguments(settings: OptimizerSettings) -> dict[str, Any]:
    """What the class is made with.

    Raises:
        ConfigError: it does not take a setting that was changed, or one of the options.
    """
    cls = optimizer_class(settings)
    taken = inspect.signature(cls.__init__).parameters
    values: dict[str, Any] = {"lr": settings.lr, **settings.options}
    default = OptimizerSettings()
    for name in _FEW:
        value = getattr(settings, name)
        if name in taken:
            values[name] = value
        elif value != getattr(default, name):
            raise ConfigError(f"optimizer.{name} is {shown(value)}, but {cls.__name__} has no {name}.")
    wrong = [name for name in values if name not in taken]
    if wrong and all(one.kind is not one.VAR_KEYWORD for one in taken.values()):
        raise ConfigError(
            f"{cls.__name__} has no argument {wrong[0]!r} (optimizer.options). It has {', '.join(list(taken)[2:])}."
        )
    return values


def check_optimizer(settings: OptimizerSettings) -> None:
    """Make the optimizer for one matrix, as every rank will for its parameters. Raises as :func:`make_optimizer`."""
    make_optimizer(nn.Linear(2, 2, bias=False), settings)


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> Optimizer:
    """The optimizer over the parameters that train; weight decay on those with two dims or more.

    Raises:
        ConfigError, UnsupportedError: the class, or its arguments, cannot be used.
    """
    cls, values = optimizer_class(settings), arguments(settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    without_decay = {"weight_decay": 0.0} if "weight_decay" in values else {}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim >= 2]},
        {"params": [p for p in trained if p.ndim < 2], **without_decay},
    ]
    with ToldAs(ConfigError, f"{cls.__name__} cannot be made with these settings for this model"):
        return cls([group for group in groups if group["params"]], **values)
