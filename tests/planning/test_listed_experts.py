"""Experts that are modules of their own in a list: refused by name where they were to lie on ranks of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, silu
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from shardwright.distributed.config import ParallelConfig
from shardwright.distributed.planning.decide import decide
from shardwright.distributed.planning.experts import decide_experts
from shardwright.distributed.planning.listed_experts import listed_experts
from shardwright.distributed.replay.reading import ModelReading
from shardwright.errors import PlanError

WIDTH, EXPERTS = 16, 4


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, 24, bias=False), nn.Linear(WIDTH, 24, bias=False)
        self.down_proj = nn.Linear(24, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Mixture(nn.Module):
    """A router and a list of experts; each kind calls them in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts: nn.Module = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.topk(self.gate(x).softmax(-1), 2, dim=-1)

    def each(self) -> Iterator[nn.Module]:
        yield from self.experts.children()


class ByMask(Mixture):
    """As Mixtral's code was before transformers 5."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        mask, total = one_hot(chosen, EXPERTS).permute(2, 1, 0), torch.zeros_like(x)
        for number, expert in enumerate(self.each()):
            choice, token = torch.where(mask[number])
            total.index_add_(0, token, expert(x[token]) * weights[token, choice, None])
        return total


class ByRepeating(Mixture):
    """As the code that comes with DeepSeek's weights, in training."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        repeated, flat = x.repeat_interleave(2, dim=0), chosen.flatten()
        found = torch.empty_like(repeated)
        for number, expert in enumerate(self.each()):
            found[flat == number] = expert(repeated[flat == number])
        return (found.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1)


class EveryToken(Mixture):
    """Every expert gets every token."""

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        return sum((expert(x) * weights[:, n, None] for n, expert in enumerate(self.each())), start=torch.zeros_like(x))


class ByName(ByMask):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({f"expert_{n}": Expert() for n in range(EXPERTS)})


class _Calls(nn.Module):
    """Experts behind a module of their own, away from the router."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.ModuleList(Expert() for _ in range(EXPERTS))


class Behind(ByMask):
    def __init__(self) -> None:
        super().__init__()
        self.experts = _Calls()

    def each(self) -> Iterator[nn.Module]:
        yield from self.experts.get_submodule("all").children()


class Block(nn.Module):
    def __init__(self, mixture: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(WIDTH), mixture

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.mlp(self.norm(x))
        return result


class Model(nn.Module):
    def __init__(self, *mixtures: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, WIDTH)
        self.layers = nn.ModuleList(map(Block, mixtures))
        self.head = nn.Linear(WIDTH, EXPERTS)  # as wide as there are experts, and no router

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).flatten(0, 1)
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.head(x)
        return result


def _stacked() -> nn.Module:
    return MixtralSparseMoeBlock(
        MixtralConfig(hidden_size=WIDTH, intermediate_size=24, num_local_experts=EXPERTS, num_experts_per_tok=2)
    )


@pytest.mark.parametrize("kind", [ByMask, ByRepeating, EveryToken, ByName, Behind])
def test_refused_by_name(kind: Callable[[], nn.Module]) -> None:
    model = Model(kind(), kind())
    assert model(torch.arange(8).view(2, 4)).shape == (8, EXPERTS)
    before = dict(model.named_parameters())
    with pytest.raises(PlanError, match=rf"holds {EXPERTS} experts as modules of their own \(Expert\)") as error:
        decide(ModelReading(model), ParallelConfig(ep=2), tp=1, ep=2, fsdp2=True)
    assert "layers.*.mlp.experts" in str(error.value)
    assert all(param is before[name] for name, param in model.named_parameters())


def test_beside_stacked_experts() -> None:
    """Those that can be spread do not hide those that cannot."""
    assert decide_experts(ModelReading(Model(_stacked(), _stacked())), 2) is not None
    with pytest.raises(PlanError, match="which ByMask calls one after another"):
        decide_experts(ModelReading(Model(_stacked(), ByMask())), 2)


def test_without_ep_they_are_layers_as_any_others() -> None:
    reading = ModelReading(Model(ByMask(), ByMask()))
    assert decide_experts(reading, 1) is None
    assert [experts.name for experts in listed_experts(reading)] == ["layers.0.mlp.experts", "layers.1.mlp.experts"]


class _Parallel(nn.Module):
    """Several modules that are alike, and no router."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Expert() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = sum((part(x) for part in self.parts), start=torch.zeros_like(x))
        return result


def test_what_is_no_list_of_experts() -> None:
    assert listed_experts(ModelReading(Model(_Parallel(), _stacked()))) == []
