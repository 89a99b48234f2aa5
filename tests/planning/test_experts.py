"""Experts in batched parameters beside layers that were read off the dataflow."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardwright.distributed.config import ParallelConfig
from shardwright.distributed.planning.decide import decide
from shardwright.distributed.planning.resolve import resolve, sharded_fraction
from shardwright.distributed.planning.sources import choose_plan
from shardwright.distributed.replay.reading import ModelReading
from shardwright.errors import PlanError
from shardwright.verify.public import case_of
from shardwright.verify.ranks import RankPool
from shardwright.verify.run import run_case

# gpt_oss: a plan for expert parallelism only. hunyuan_v1_moe: transformers' plan cuts the experts and nothing else.
STYLES = {"gpt_oss": "ep_dispatch_experts", "hunyuan_v1_moe": "moe_tp_experts"}
SP2 = ParallelConfig(tp=2, sequence_parallel=True)


@pytest.mark.parametrize("model_type", STYLES)
def test_experts_and_layers_are_cut(model_type: str) -> None:
    model = case_of(model_type, SP2).build()
    rules = model.config.base_model_ep_plan if STYLES[model_type] == "ep_dispatch_experts" else model.model._tp_plan
    if "layers.*.mlp.experts" not in (rules or {}):
        pytest.skip("this version of transformers has no rule for these experts")
    plan = choose_plan(ModelReading(model))
    assert plan.styles["model.layers.*.mlp.experts"] == STYLES[model_type]
    assert plan.styles["model.layers.*.self_attn.q_proj"] == "colwise"
    assert sharded_fraction(ModelReading(model), resolve(ModelReading(model), plan, 2)) > 0.98


def test_experts_that_the_ranks_do_not_divide_stay_whole() -> None:
    model = case_of("gpt_oss", SP2).build()
    for layer in model.model.layers:
        layer.mlp.experts.num_experts = 7
    assert "model.layers.*.mlp.experts" not in choose_plan(ModelReading(model)).styles


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_exact(ranks2: RankPool, sequence_parallel: bool) -> None:
    case = case_of("gpt_oss", replace(SP2, sequence_parallel=sequence_parallel))
    report = ranks2.run(run_case, case)[0]
    assert report.exact, report
    assert report.sharded_fraction > 0.98


def test_layers_with_experts_that_each_rank_would_leave_out_for_itself() -> None:
    config = ParallelConfig(dp_shard=2, ep=2)
    reading = ModelReading(case_of("nllb-moe", config).build())
    with pytest.raises(PlanError, match=r"model\.encoder leaves out layers at random \(layerdrop is 0\.4\)"):
        decide(reading, config, tp=1, ep=2, fsdp2=True)
    reading.model.model.encoder.layerdrop = reading.model.model.decoder.layerdrop = 0.0
    assert decide(reading, config, tp=1, ep=2, fsdp2=True).experts is not None
    reading.model.model.encoder.layerdrop = 0.4
    shared = decide(reading, ParallelConfig(tp=2, ep=2), tp=2, ep=2, fsdp2=False)  # one batch, one draw
    assert shared.experts is not None
