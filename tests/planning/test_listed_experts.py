"""Experts that are modules in a list: found by their structure, tried, and spread or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expert_mixtures import (
    EXPERTS,
    WIDTH,
    Balanced,
    Behind,
    ByHits,
    ByMask,
    ByName,
    ByRepeating,
    Capacity,
    Chained,
    EveryToken,
    Expert,
    Looking,
    Mixing,
    Mixture,
    Shared,
    TwoLists,
    WeightsInside,
    WithoutGradients,
    model_with,
)
from torch import Tensor, nn
from transformers import (
    MixtralConfig,
    NllbMoeConfig,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeExperts

from shardwright.distributed.config import ParallelConfig
from shardwright.distributed.planning.decide import decide
from shardwright.distributed.planning.experts import decide_experts
from shardwright.distributed.planning.listed_experts import listed_experts
from shardwright.distributed.replay.reading import ModelReading
from shardwright.errors import PlanError


def _stacked() -> nn.Module:
    return MixtralSparseMoeBlock(
        MixtralConfig(hidden_size=WIDTH, intermediate_size=24, num_local_experts=EXPERTS, num_experts_per_tok=2)
    )


@pytest.mark.parametrize(
    "kind",
    [
        ByMask,
        ByHits,
        ByRepeating,
        EveryToken,
        ByName,
        Behind,
        WeightsInside,
        Capacity,
        Shared,
        Balanced,
        WithoutGradients,
    ],
)
def test_spread(kind: type[Mixture]) -> None:
    model = model_with(kind)
    before = {name: param.clone() for name, param in model.named_parameters()}
    plan = decide_experts(ModelReading(model), 2)
    assert plan is not None
    (name,) = plan.modules
    listed = plan.modules[name].listed
    assert listed is not None
    assert (listed.caller, len(listed.loop.experts)) == ("model.layers.0.mlp", EXPERTS)
    assert f"model.layers.0.mlp.{listed.loop.container}" == name
    assert listed.called.tails == (((WIDTH,), (1,)) if kind is WeightsInside else ((WIDTH,),))
    assert len(plan.parameters) == (6 if kind is WithoutGradients else 4) * EXPERTS
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())


def test_the_unit_of_a_list() -> None:
    reading = ModelReading(model_with(ByHits))
    decided = decide(reading, ParallelConfig(ep=2, compile=True), tp=1, ep=2, fsdp2=True)
    assert decided.data is not None
    (unit,) = (unit for unit in decided.data.units if unit.experts)
    assert unit.modules == tuple(f"model.layers.0.mlp.experts.{n}" for n in range(EXPERTS))
    assert "model.layers.0.self_attn" in decided.compiled
    assert not any(name.startswith("model.layers.0.mlp") for name in decided.compiled)


class _Unlike(ByMask):
    """Experts that share a layer."""

    def __init__(self) -> None:
        super().__init__()
        first, second, *_ = self.each()
        second.get_submodule("down_proj").weight = first.get_submodule("down_proj").weight


class _Stored(ByMask):
    """Its list is there, and its code does something else."""

    def mixed(self, x: Tensor) -> Tensor:
        return x * self.gate(x).sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Chained, "calls an expert with what another expert returned"),
        (Looking, "looks at what they return"),
        (Mixing, "something else when the tokens of an expert are computed together"),
        (_Unlike, "share parameters"),
        (_Stored, "did not call them"),
        (TwoLists, "The code of model.layers.1.mlp calls those of model.layers.1.mlp.experts, too"),
    ],
)
def test_refused_by_name(kind: type[Mixture], reason: str) -> None:
    model = model_with(ByMask, kind)
    with pytest.raises(PlanError, match=rf"the {EXPERTS} experts of model.layers.*.mlp.\w+ \(") as error:
        decide(ModelReading(model), ParallelConfig(ep=2), tp=1, ep=2, fsdp2=True)
    assert reason in str(error.value)
    assert "UnsupportedError" not in str(error.value)
    assert decide(ModelReading(model), ParallelConfig(), tp=1, fsdp2=True).experts is None


def test_lists_with_a_forward() -> None:
    """Those of Switch and of NLLB-MoE, which also holds a dropout."""
    sizes: dict[str, Any] = {"vocab_size": 64, "d_model": 32, "num_experts": 4, "num_layers": 2, "num_heads": 4}
    switch = SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(
            **sizes, d_kv=8, d_ff=48, num_decoder_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
            decoder_start_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip
    plan = decide_experts(ModelReading(switch), 2)
    assert plan is not None
    assert set(plan.exchanging) == set(plan.modules)
    nllb = NllbMoeExperts(NllbMoeConfig(**sizes), 48)
    model = nn.ModuleDict({"router": nn.Linear(32, 4), "experts": nllb})
    (listed,) = listed_experts(ModelReading(model))
    assert listed.names == ("expert_0", "expert_1", "expert_2", "expert_3")


def test_too_many_ranks() -> None:
    with pytest.raises(PlanError, match="has 4 experts, and ep=8 would leave ranks without any"):
        decide_experts(ModelReading(model_with(ByMask)), 8)


def test_beside_stacked_experts() -> None:
    plan = decide_experts(ModelReading(model_with(_stacked, ByMask)), 2)
    assert plan is not None
    assert {name: experts.kind for name, experts in plan.modules.items()} == {
        "model.layers.0.mlp.experts": "routed",
        "model.layers.1.mlp.experts": "listed",
    }


def test_without_ep_they_are_layers_as_any_others() -> None:
    reading = ModelReading(model_with(ByMask, ByMask))
    assert decide_experts(reading, 1) is None
    assert [experts.name for experts in listed_experts(reading)] == [
        "model.layers.0.mlp.experts",
        "model.layers.1.mlp.experts",
    ]


class _Parallel(nn.Module):
    """Several modules that are alike, and no router."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Expert() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([part(x) for part in self.parts]).sum(0)


def test_what_is_no_list_of_experts() -> None:
    assert listed_experts(ModelReading(model_with(_Parallel, _stacked))) == []
