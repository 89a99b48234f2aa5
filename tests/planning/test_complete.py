"""Plans of transformers that say nothing about some of the layers are completed from the dataflow."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardwright.distributed.config import ParallelConfig
from shardwright.distributed.plan import ParallelPlan
from shardwright.distributed.planning.complete import completed
from shardwright.distributed.planning.resolve import resolve
from shardwright.distributed.planning.tensor import plan_and_resolve
from shardwright.distributed.replay.reading import ModelReading
from shardwright.verify.public import case_of
from shardwright.verify.ranks import RankPool
from shardwright.verify.run import run_case
from shardwright.verify.source import load_config
from shardwright.verify.tiny import build, shrunk_config

TP2 = ParallelConfig(tp=2)
ATTENTION, MLP = "model.layers.*.self_attn", "model.layers.*.mlp"
NEURONS = {f"{MLP}.gate_proj": "colwise", f"{MLP}.up_proj": "colwise", f"{MLP}.down_proj": "rowwise"}
HEADS = {f"{ATTENTION}.{name}_proj": "colwise" for name in "qkv"} | {f"{ATTENTION}.o_proj": "rowwise"}
# Attention (latent, or with a gate) or shared experts that transformers' plan does not name.
INCOMPLETE = ("deepseek_v3", "qwen2_moe", "mistral4")


def _completed(model_type: str, styles: dict[str, str]) -> ParallelPlan | None:
    model = build(shrunk_config(load_config(model_type)))
    plan = ParallelPlan(styles, source="huggingface")
    return completed(ModelReading(model), plan, resolve(ModelReading(model), plan, 2))


@pytest.mark.parametrize("left", [HEADS, NEURONS], ids=["attention", "mlp"])
def test_what_a_plan_does_not_name_is_added(left: dict[str, str]) -> None:
    named = {glob: style for glob, style in (HEADS | NEURONS).items() if glob not in left}
    plan = _completed("llama", named)
    assert plan is not None
    assert plan.styles == {**named, **left}
    assert (plan.source, plan.tp) == ("huggingface + dataflow (tp=2)", 2)
    assert any("runs on slices" in note for note in plan.notes)


def test_what_a_plan_names_stays_as_it_says() -> None:
    assert _completed("llama", HEADS | NEURONS) is None
    assert _completed("llama", HEADS | dict.fromkeys(NEURONS, "replicate")) is None
    assert _completed("llama", NEURONS | {f"{ATTENTION}.q_proj": "colwise_gather_output"}) is None


def test_routers_are_not_worth_a_look() -> None:
    model = build(shrunk_config(load_config("qwen3_moe")))
    assert plan_and_resolve(ModelReading(model), None, 2)[0].source == "huggingface"


@pytest.mark.parametrize("model_type", INCOMPLETE)
def test_exact(ranks2: RankPool, model_type: str) -> None:
    for config in (TP2, replace(TP2, sequence_parallel=True)):
        report = ranks2.run(run_case, case_of(model_type, config))[0]
        assert report.exact, report
        assert report.sharded_fraction > 0.92, report


def test_what_stays_whole_is_said() -> None:
    jetmoe = plan_and_resolve(ModelReading(build(shrunk_config(load_config("jetmoe")))), None, 2)[1]
    assert "% of the blocks' matrices are whole" in jetmoe.notes[-1]
    assert "model.layers.*.mlp.input_linear.weight" in jetmoe.notes[-1]
    llama = build(shrunk_config(load_config("llama")))
    assert not plan_and_resolve(ModelReading(llama), None, 2)[1].notes
    # Of a block: 4 x 64 x 64 in attention, 3 x 64 x 96 in the MLP.
    assert plan_and_resolve(ModelReading(llama), HEADS, 2)[1].notes[-1].startswith("53% of the blocks' matrices")
