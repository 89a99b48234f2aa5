"""Expert parallelism with the mistakes that are known from real libraries planted in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardwright import ParallelConfig, api
from shardwright.distributed.runtime.expert_exchange import Arrivals, ExpertExchange, RoutedExperts
from shardwright.distributed.runtime.expert_tensors import ExpertTensor
from shardwright.distributed.runtime.forward import Forward, arounds


def _with(kind: type[RoutedExperts], model: nn.Module, config: ParallelConfig, mesh: DeviceMesh) -> nn.Module:
    """The model with every exchange of another kind."""
    return _changed(lambda exchange: setattr(exchange, "__class__", kind), model, config, mesh)


def _changed(
    change: Callable[[ExpertExchange], None], model: nn.Module, config: ParallelConfig, mesh: DeviceMesh
) -> nn.Module:
    api.parallelize(model, config, mesh)
    for module in model.modules():
        for around in arounds(module):
            if isinstance(around, ExpertExchange):
                change(around)
    return model


class _RouterCutOff(RoutedExperts):
    def run(self, module: nn.Module, forward: Forward, *values: Any) -> Tensor:
        hidden, index, weights = values
        return super().run(module, forward, hidden, index, weights.detach())


def router_cut_off(model: nn.Module, config: ParallelConfig, mesh: DeviceMesh) -> nn.Module:
    """The weights travel without their gradients."""
    return _with(_RouterCutOff, model, config, mesh)


class _TokensCutOff(RoutedExperts):
    def _computed(self, module: nn.Module, forward: Forward, rows: Tensor, arrivals: Arrivals) -> Tensor:
        return super()._computed(module, forward, rows.detach(), arrivals)


def tokens_cut_off(model: nn.Module, config: ParallelConfig, mesh: DeviceMesh) -> nn.Module:
    """The tokens arrive without a way back for their gradients."""
    return _with(_TokensCutOff, model, config, mesh)


def gradients_not_divided(model: nn.Module, config: ParallelConfig, mesh: DeviceMesh) -> nn.Module:
    """Experts sum the tokens of all ranks, and are divided by FSDP2's ranks only."""
    return _changed(lambda exchange: setattr(exchange, "gradient_factor", 1.0), model, config, mesh)


class _Dropping(RoutedExperts):
    def run(self, module: nn.Module, forward: Forward, *values: Any) -> Tensor:
        hidden, index, weights = values
        kept = torch.where(torch.arange(len(index)) < len(index) - 1, 0, self.experts)
        return super().run(module, forward, hidden, torch.maximum(index, kept.unsqueeze(-1)), weights)


def tokens_dropped(model: nn.Module, config: ParallelConfig, mesh: DeviceMesh) -> nn.Module:
    """A token beyond the capacity goes nowhere."""
    return _with(_Dropping, model, config, mesh)


class _NothingCame(RoutedExperts):
    def _computed(self, module: nn.Module, forward: Forward, rows: Tensor, arrivals: Arrivals) -> Tensor:
        return super()._computed(module, forward, rows, arrivals) if len(rows) else rows


def no_gradient_where_nothing_came(model: nn.Module, config: ParallelConfig, mesh: DeviceMesh) -> nn.Module:
    """A rank that no token came to has no gradients, and its experts miss the weight decay."""
    return _with(_NothingCame, model, config, mesh)


def norm_of_own_experts(model: nn.Module, config: ParallelConfig, mesh: DeviceMesh) -> nn.Module:
    """Every rank clips by the experts that it holds itself."""
    api.parallelize(model, config, mesh)
    for param in model.parameters():
        if isinstance(param, ExpertTensor):
            param.register_post_accumulate_grad_hook(_weigh_by_half)
    return model


def _weigh_by_half(param: Tensor) -> None:
    gradient = param.grad
    assert gradient is not None
    gradient.__class__ = _OwnNorm


class _OwnNorm(ExpertTensor):
    """A gradient whose norm is that of this rank's shard, as if the others had the same."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if func is torch.linalg.vector_norm:
            return result / 2**0.5
        return result


class _RoutesAnew(RoutedExperts):
    calls = 0

    def run(self, module: nn.Module, forward: Forward, *values: Any) -> Tensor:
        hidden, index, weights = values
        self.calls += 1
        return super().run(module, forward, hidden, index if self.calls % 2 else index.flip(-1), weights)


def routed_anew(model: nn.Module, config: ParallelConfig, mesh: DeviceMesh) -> nn.Module:
    """A recomputed block sends tokens elsewhere than it did."""
    return _with(_RoutesAnew, model, config, mesh)


def computed_by_all(model: nn.Module, config: ParallelConfig, mesh: DeviceMesh) -> nn.Module:
    """Tensor-parallel ranks send all of their tokens each."""
    return _changed(lambda exchange: setattr(exchange, "sharing", None), model, config, mesh)


EP2 = ParallelConfig(dp_shard=2, ep=2)
# What is planted -> where it shows.
FAULTS = {
    router_cut_off: EP2,
    tokens_cut_off: EP2,
    gradients_not_divided: EP2,
    tokens_dropped: EP2,
    no_gradient_where_nothing_came: EP2,
    norm_of_own_experts: EP2,
    routed_anew: EP2.with_(activation_checkpointing="full"),
    computed_by_all: ParallelConfig(dp_shard=1, tp=2, ep=2),
}
