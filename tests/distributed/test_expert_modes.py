"""Experts on ranks of their own among four ranks, for every way in which experts are stored and called."""

from __future__ import annotations

import pytest

from shardwright import ParallelConfig
from shardwright.distributed.planning.decide import decide
from shardwright.distributed.planning.experts import decide_experts
from shardwright.distributed.replay.reading import ModelReading
from shardwright.verify import verify
from shardwright.verify.public import case_of
from shardwright.verify.ranks import RankPool
from shardwright.verify.zoo import EXPERT_MODES

WITHIN, ACROSS = EXPERT_MODES["fsdp2_tp2_ep2"].config, EXPERT_MODES["fsdp2_tp2_ep4"].config


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("gpt_oss", WITHIN),  # interleaved and transposed weights, biases
        ("deepseek_v3", WITHIN),  # a router in groups with a bias for selection, a shared expert
        pytest.param("jetmoe", WITHIN, marks=pytest.mark.sweep),  # sorted rows, in attention too
        ("deepseek_v3", ACROSS),
        ("qwen2_moe", ACROSS),  # gate and up in one, a gated shared expert
        ("llama4_text", ACROSS),  # every expert gets every token
        ("nemotron_h", ACROSS),  # no gate, other blocks between
    ],
    ids=lambda value: value if isinstance(value, str) else f"ep{value.ep}",
)
def test_four_ranks(ranks4: RankPool, model_type: str, config: ParallelConfig) -> None:
    report = verify(model_type, config, accumulate=2, pool=ranks4)
    assert report.exact, report.summary()
    assert report.spread_fraction > 0.15
    assert report.expert_grad_rel_err is not None
    assert report.expert_grad_rel_err < 1e-5


@pytest.mark.parametrize("model_type", ["gpt_oss", "deepseek_v3", pytest.param("granitemoe", marks=pytest.mark.sweep)])
def test_two_ranks_that_share_tokens(ranks2: RankPool, model_type: str) -> None:
    report = verify(model_type, EXPERT_MODES["ep2_over_tp2_sp"].config, pool=ranks2)
    assert report.exact, report.summary()
    assert report.spread_fraction > 0.15


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("deepseek_v3", EXPERT_MODES["ep2"].config.with_(activation_checkpointing="full")),
        pytest.param("gpt_oss", EXPERT_MODES["ep2_over_tp2_sp"].config, marks=pytest.mark.sweep),
    ],
    ids=["deepseek_v3", "gpt_oss"],
)
def test_compiled_around_experts(ranks2: RankPool, model_type: str, config: ParallelConfig) -> None:
    config = config.with_(compile="aot_eager")
    report = verify(model_type, config, accumulate=2, pool=ranks2)
    assert report.exact, report.summary()
    reading = ModelReading(case_of(model_type, config).build())
    compiled = decide(reading, config, tp=1, ep=2, fsdp2=True).compiled
    experts = [name for name in compiled if any(f"{other}.".startswith(f"{name}.") for other in _experts(reading))]
    assert not experts
    assert "model.layers.1.self_attn" in compiled
    assert ("model.layers.0" in compiled) == (model_type == "deepseek_v3")  # whose first block has no experts


def _experts(reading: ModelReading) -> list[str]:
    plan = decide_experts(reading, 2)
    assert plan is not None
    return list(plan.modules)
