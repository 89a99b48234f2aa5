"""Expert parallelism with the mistakes that are known from real libraries planted in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from shardwright import ParallelConfig, api
from shardwright.distributed.runtime.expert_exchange import Arrivals, ExpertExchange, RoutedExperts
from shardwright.distributed.runtime.expert_tensors import ExpertTensor
from shardwright.distributed.runtime.forward import Forward, arounds
from shardwright.distributed.styles.experts import _ExpertsForward


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


class _MaskedRows(RoutedExperts):
    def _exchanged(self, module: nn.Module, forward: Forward, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        nothing = (weights - weights.detach())[:, -1:]
        return super()._exchanged(module, forward, hidden, index, weights) + nothing * hidden.detach()


def masked_rows_reach_the_router(model: nn.Module, config: ParallelConfig, mesh: DeviceMesh) -> nn.Module:
    """Rows of other ranks' experts are computed, too, and count for nothing but in the router's gradients."""
    return _with(_MaskedRows, model, config, mesh)


class _BiasOnEveryRank(RoutedExperts):
    def _computed(self, module: nn.Module, forward: Forward, rows: Tensor, arrivals: Arrivals) -> Tensor:
        bias = next(param for name, param in module.named_parameters() if name.endswith("down_proj_bias"))
        return super()._computed(module, forward, rows, arrivals) + bias[arrivals.own_experts()]


def bias_on_every_rank(model: nn.Module, config: ParallelConfig, mesh: DeviceMesh) -> nn.Module:
    """A bias that both tensor-parallel ranks add before their results are summed."""
    return _with(_BiasOnEveryRank, model, config, mesh)


class _InputsPartial(_ExpertsForward):
    def _enter(self, x: Any) -> Any:
        return x


def inputs_partial(model: nn.Module, config: ParallelConfig, mesh: DeviceMesh) -> nn.Module:
    """Slices of experts on every tensor-parallel rank: each keeps its own part of the gradient of their inputs."""
    api.parallelize(model, config, mesh)
    for module in model.modules():
        for around in arounds(module):
            if isinstance(around, _ExpertsForward):
                around.__class__ = _InputsPartial
    return model


class _CountsAgain:
    """A forward hook on a router, which a recomputed block calls twice."""

    def __init__(self, router: BalancedRouter) -> None:
        self.load, self.calls = router.load, 0

    def __call__(self, router: nn.Module, args: Any, output: Any) -> None:
        self.calls += 1
        if self.calls % 2 == 0:
            self.load += torch.bincount(output[2].flatten(), minlength=len(self.load))


def counted_twice(model: nn.Module, config: ParallelConfig, mesh: DeviceMesh) -> nn.Module:
    """Recomputed blocks count their tokens once more."""
    api.parallelize(model, config, mesh)
    for module in model.modules():
        if isinstance(module, BalancedRouter):
            module.register_forward_hook(_CountsAgain(module))
    return model


class BalancedRouter(MixtralTopKRouter):
    """Chooses less what was chosen before, by the tokens that it has counted."""

    load: Tensor

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        index = torch.topk(logits.softmax(-1) - 0.05 * self.load, self.top_k, dim=-1).indices
        self.load += torch.bincount(index.flatten(), minlength=self.num_experts)
        return logits, logits.softmax(-1).gather(-1, index), index


EP2 = ParallelConfig(dp_shard=2, ep=2)
OVER_TP = ParallelConfig(dp_shard=1, tp=2, ep=2)
# What is planted -> where it shows.
FAULTS = {
    router_cut_off: EP2,
    tokens_cut_off: EP2,
    gradients_not_divided: EP2,
    tokens_dropped: EP2,
    no_gradient_where_nothing_came: EP2,
    norm_of_own_experts: EP2,
    routed_anew: EP2.with_(activation_checkpointing="full"),
    computed_by_all: OVER_TP,
    masked_rows_reach_the_router: EP2,
    bias_on_every_rank: OVER_TP,
    inputs_partial: ParallelConfig(tp=2),
    counted_twice: OVER_TP.with_(activation_checkpointing="full"),
}
