"""Parameters that cannot be sharded as they are: refused before anything is changed."""

from __future__ import annotations

from torch import nn

from shardwright._torch import has_gradient_hooks
from shardwright.errors import PlanError


def check_gradient_hooks(model: nn.Module) -> None:
    """Raise PlanError where a parameter has hooks on its gradient: sharding replaces it, and they would be lost."""
    for name, param in model.named_parameters():
        if has_gradient_hooks(param):
            raise PlanError(
                f"{name} has a gradient hook (register_hook or register_post_accumulate_grad_hook), which sharding "
                "would lose: the parameter becomes another tensor. Change .grad after loss.backward() instead, or put "
                "a hook on the module."
            )


def check_scalars(model: nn.Module) -> None:
    """Raise PlanError where a parameter has no dim, which FSDP2 does not take."""
    for name, param in model.named_parameters():
        if param.ndim == 0:
            raise PlanError(
                f"{name} has no dim, and FSDP2 shards parameters along one. Give it one element in one dim before "
                f"sharding: model.{name} = torch.nn.Parameter(model.{name}.detach().reshape(1))."
            )
