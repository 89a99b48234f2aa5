"""Which parameters an optimizer holds, by name: sharding replaces the objects."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from shardwright.errors import ConfigError


def names_before_sharding(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """The names of the optimizer's parameters, by group.

    Raises:
        ConfigError: it has state already, or parameters that are not in ``model``.
    """
    if optimizer.state:
        raise ConfigError(
            f"The {type(optimizer).__name__} already has state for {len(optimizer.state)} whole parameters, which "
            "would not fit their shards. Shard the model first, then load the optimizer's state."
        )
    return parameter_names({id(param): name for name, param in model.named_parameters()}, model, optimizer)


def parameter_names(places: dict[int, str], model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """The same, for parameters whose names are ``places[id(parameter)]``."""
    for number, group in enumerate(optimizer.param_groups):
        strangers = [param for param in group["params"] if id(param) not in places]
        if strangers:
            shapes = ", ".join(str(tuple(param.shape)) for param in strangers[:3])
            raise ConfigError(
                f"Parameter group {number} of the {type(optimizer).__name__} holds {len(strangers)} parameters that "
                f"are not in the {type(model).__name__} (of shapes {shapes}). Make the optimizer from the parameters "
                "of the model that is sharded."
            )
    return [[places[id(param)] for param in group["params"]] for group in optimizer.param_groups]
