"""An optimizer over the shards of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_fsdp import fully_shard_optimizer
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from shardwright.distributed.apply.megatron_fsdp.engine import ShardedModel
from shardwright.distributed.apply.megatron_fsdp.names import parameter_names


def attach(sharded: ShardedModel, optimizer: Optimizer, names: list[list[str]]) -> None:
    """Give ``optimizer`` the distributed parameters called ``names`` (by group), and the package's step.

    Groups, hyper-parameters, state and gradients stay as they are.
    """
    by_name = sharded.distributed
    for group, in_group in zip(optimizer.param_groups, names, strict=True):
        group["params"] = [by_name[name] for name in in_group]
    with _untouched_gradients(by_name), _without_step(optimizer):
        fully_shard_optimizer(optimizer, preproc_state_dict_for_dcp_ckpt=False)
    order = list(dict.fromkeys(name for in_group in names for name in in_group))

    def describe(_: Optimizer, state_dict: dict[str, Any]) -> None:
        for index, state in state_dict["state"].items():
            param = by_name[order[index]]
            for value in state.values():
                if isinstance(value, DTensor) and value.shape == param.shape:
                    sharded.describe(param, value)

    optimizer.register_state_dict_post_hook(describe)


def attach_by_identity(model: nn.Module, optimizer: Optimizer) -> None:
    """:func:`attach` for an optimizer that holds raw or distributed parameters of the sharded ``model``."""
    sharded = ShardedModel.of(model)
    places = {id(raw): name for name, raw in sharded.raw_param.items()}
    places |= {id(param): name for name, param in sharded.distributed.items()}
    attach(sharded, optimizer, parameter_names(places, model, optimizer))


@contextmanager
def _without_step(optimizer: Optimizer) -> Iterator[None]:
    """``optimizer.step()`` does nothing inside, until something else is put in its place.

    The package primes an optimizer with a step on zero gradients, which decays the weights and counts as a step. It is
    there to make the state exist before a checkpoint is loaded, and torch's loading does that by itself.
    """

    def nothing(*_: Any, **__: Any) -> None:
        return None

    optimizer.__dict__["step"] = nothing
    yield
    assert optimizer.__dict__["step"] is not nothing, "fully_shard_optimizer replaces step"


@contextmanager
def _untouched_gradients(params: dict[str, nn.Parameter]) -> Iterator[None]:
    before = {name: param.grad for name, param in params.items()}
    yield
    for name, grad in before.items():
        params[name].grad = grad
