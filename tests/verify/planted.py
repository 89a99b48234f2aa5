"""Tensor parallelism made by hand with torch alone, and the mistakes that are known from real libraries.

It knows nothing of Shardwright, so that ``verify`` is shown to judge code it did not come with.
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from shardwright import ParallelConfig

COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROWS = ("o_proj", "down_proj")


def _keep_whole(module: nn.Module, mesh: DeviceMesh) -> None:
    """Make the module's own parameters replicated DTensors that it computes with as plain tensors.

    ``to_local`` takes the gradient that arrives for that of every rank: right where all ranks do the same work.
    """
    inner = copy.copy(module)
    inner._parameters = dict(module._parameters)
    for name, parameter in inner._parameters.items():
        if parameter is not None:
            module.register_parameter(name, nn.Parameter(distribute_tensor(parameter.data, mesh, [Replicate()])))

    def forward(*args: torch.Tensor) -> torch.Tensor:
        local = {name: parameter.to_local() for name, parameter in module.named_parameters(recurse=False)}
        return torch.func.functional_call(inner, local, args)

    module.forward = forward


def by_hand(
    model: nn.Module, config: ParallelConfig, mesh: DeviceMesh, columns: tuple = COLUMNS, rows: tuple = ROWS
) -> nn.Module:
    """Megatron's cut: right for Llama, wrong for a model that has more in its blocks than the two tuples say."""
    tp = mesh["tp"]
    for name, module in list(model.named_modules()):
        last = name.rpartition(".")[2]
        if last in columns:
            parallelize_module(module, tp, ColwiseParallel())
        elif last in rows:
            parallelize_module(module, tp, RowwiseParallel())
        elif any(True for _ in module.parameters(recurse=False)):
            _keep_whole(module, tp)
    return model


def q_norm_left_out(model: nn.Module, config: ParallelConfig, mesh: DeviceMesh) -> nn.Module:
    """The q and k norms see this rank's heads only, and nobody sums their gradients."""
    return by_hand(model, config, mesh)


def packed_cut_as_block(model: nn.Module, config: ParallelConfig, mesh: DeviceMesh) -> nn.Module:
    """``gate_up_proj`` holds gate over up; a rank that takes the upper half takes all of gate."""
    return by_hand(model, config, mesh, columns=("gate_up_proj",), rows=("down_proj",))


def reduced_twice(model: nn.Module, config: ParallelConfig, mesh: DeviceMesh) -> nn.Module:
    """Sums ``.grad`` after every backward, so what earlier micro-batches left in it is summed again."""
    model = by_hand(model, config, mesh)

    def reduce(parameter: nn.Parameter) -> None:
        dist.all_reduce(parameter.grad.to_local(), group=mesh["tp"].get_group())

    for name, parameter in model.named_parameters():
        if "q_norm" in name or "k_norm" in name:
            parameter.register_post_accumulate_grad_hook(reduce)
    return model


def evaluated_with_a_copy(model: nn.Module, config: ParallelConfig, mesh: DeviceMesh) -> nn.Module:
    """Evaluates with the weights of the first evaluation."""
    model = by_hand(model, config, mesh)
    forward, copies = model.forward, []

    def evaluating(*args: object, **kwargs: object) -> object:
        if model.training:
            return forward(*args, **kwargs)
        now = [parameter.to_local().clone() for parameter in model.parameters()]
        copies.append(now)
        _write(model, copies[0])
        output = forward(*args, **kwargs)
        _write(model, now)
        return output

    model.forward = evaluating
    return model


def _write(model: nn.Module, values: list[torch.Tensor]) -> None:
    for parameter, value in zip(model.parameters(), values, strict=True):
        parameter.to_local().copy_(value)


def gradients_lost_in_evaluation(model: nn.Module, config: ParallelConfig, mesh: DeviceMesh) -> nn.Module:
    """An evaluation between backward and step takes the gradients of a norm away."""
    model = by_hand(model, config, mesh)

    def forget(module: nn.Module, args: object) -> None:
        if not model.training:
            module.weight.grad = None

    model.model.norm.register_forward_pre_hook(forget)
    return model


def fsdp2_of_torch(model: nn.Module, config: ParallelConfig, mesh: DeviceMesh) -> nn.Module:
    """torch's own, which leaves the root gathered after an evaluation, and computes with that later."""
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["dp_shard"])
    fully_shard(model, mesh=mesh["dp_shard"])
    return model


def wrong_on_rank_1(model: nn.Module, config: ParallelConfig, mesh: DeviceMesh) -> nn.Module:
    """Right on rank 0; rank 1 computes with another final norm."""
    model = by_hand(model, config, mesh)
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.model.norm.weight.to_local().mul_(1.01)
    return model
