"""Plans from elsewhere are replayed before they are used: the right ones pass, every planted mistake is named."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from shardwright.distributed.config import ParallelConfig
from shardwright.distributed.plan import ParallelPlan
from shardwright.distributed.planning.decide import decide
from shardwright.distributed.planning.derive import derive_plan
from shardwright.distributed.planning.replay_check import why_not_exact
from shardwright.distributed.planning.resolve import resolve
from shardwright.distributed.planning.sources import choose_plan, huggingface_plan
from shardwright.distributed.planning.tensor import plan_and_resolve
from shardwright.distributed.replay.reading import ModelReading
from shardwright.distributed.replay.record import Call
from shardwright.errors import PlanError
from shardwright.verify.source import load_config
from shardwright.verify.tiny import build, shrunk_config

ATTENTION = "model.layers.*.self_attn"
MLP = "model.layers.*.mlp"
HEADS = {f"{ATTENTION}.{name}_proj": "colwise" for name in "qkv"} | {f"{ATTENTION}.o_proj": "rowwise"}
NEURONS = {f"{MLP}.gate_proj": "colwise", f"{MLP}.up_proj": "colwise", f"{MLP}.down_proj": "rowwise"}
PACKED = {f"{MLP}.gate_up_proj": "colwise", f"{MLP}.down_proj": "rowwise"}
MISTAKES = {
    "a packed weight cut as a block": ("phi3", PACKED, "mlp.down_proj gets other values"),
    "a writer left whole": ("llama", {f"{MLP}.gate_proj": "colwise", f"{MLP}.up_proj": "colwise"}, "down_proj gets"),
    "a reader left whole": ("llama", NEURONS | {f"{MLP}.up_proj": "replicate"}, "does not run on slices"),
    "reader and writer exchanged": ("llama", NEURONS | {f"{MLP}.up_proj": "rowwise"}, "up_proj gets other values"),
    "one projection of three": ("qwen3", HEADS | {f"{ATTENTION}.v_proj": "replicate"}, "does not run on slices"),
    "a wrong layer among right ones": ("llama", NEURONS | {"model.layers.1.mlp.up_proj": "replicate"}, "run on slices"),
    "a norm over the whole width of cut heads": ("olmo2", HEADS, "does not run on slices|gets other values"),
    "a gradient summed that is whole already": (
        "llama",
        {"model.layers.*.input_layernorm": "replicated_with_grad_allreduce"},
        "input_layernorm.weight is whole on every rank",
    ),
}


def _tiny(model_type: str, tp: int = 2) -> nn.Module:
    return build(shrunk_config(load_config(model_type), tp))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_plan_is_named(mistake: str) -> None:
    model_type, plan, reason = MISTAKES[mistake]
    with pytest.raises(PlanError, match=reason):
        plan_and_resolve(ModelReading(_tiny(model_type)), plan, 2)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize(
    "model_type",
    ["llama", "qwen3", "phi3", "gemma2", "mixtral", "deepseek_v3", "olmo2", "llama4_text", "qwen3_next", "falcon_h1"],
)
def test_right_plans_pass(model_type: str, tp: int) -> None:
    reading = ModelReading(_tiny(model_type, tp))
    plan = choose_plan(reading, None, tp)
    for sequence_parallel in (False, True):
        resolved = resolve(reading, plan, tp, sequence_parallel=sequence_parallel)
        assert why_not_exact(reading, resolved) is None


def test_fewer_key_value_heads_than_ranks() -> None:
    config = shrunk_config(load_config("llama"))
    config.num_attention_heads, config.num_key_value_heads = 4, 2
    assert plan_and_resolve(ModelReading(build(config)), HEADS | NEURONS, 4)[0].source == "custom: dict"


def test_a_wrong_plan_of_transformers_gives_way_to_the_code() -> None:
    model = _tiny("doge")
    assert huggingface_plan(model) is not None
    plan, resolved = plan_and_resolve(ModelReading(model), None, 2)
    assert plan.source == "dataflow (tp=2)"
    assert "the plan from huggingface is not exact for this model" in resolved.notes[0]


def test_an_edited_plan_is_played_again() -> None:
    model = _tiny("gpt2")
    derived = choose_plan(ModelReading(model), None, 2)
    assert plan_and_resolve(ModelReading(model), derived, 2)[0] is derived
    edited = ParallelPlan.from_yaml(derived.to_yaml().replace("packed_colwise:3", "colwise"))
    assert edited != derived
    with pytest.raises(PlanError, match="does not compute what GPT2LMHeadModel computes"):
        plan_and_resolve(ModelReading(model), edited, 2)


def test_a_replay_leaves_nothing_behind() -> None:
    def kept() -> int:
        gc.collect()
        return sum(isinstance(each, Call) for each in gc.get_objects())

    before = kept()  # what a test that failed has left in its traceback
    model = _tiny("llama")
    plan_and_resolve(ModelReading(model), HEADS | NEURONS, 2, sequence_parallel=True)
    derive_plan(model, check=True)
    assert kept() == before


def test_a_model_that_cannot_be_replayed_is_not_refuted() -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, box: dict[str, nn.Module]) -> None:
            box["x"](self.layer)

    model = Strange()
    assert plan_and_resolve(ModelReading(model), {"layer": "colwise"}, 2)[1].modules["layer"].style == "colwise"


class MultiQuery(nn.Module):
    """Attention whose heads share a key, a value and a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = (nn.Linear(32, 32, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(32, 8, bias=False) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (-1, 8)).transpose(1, 2) * self.scale
        k, v = (layer(x).unsqueeze(1).expand(-1, q.shape[1], -1, -1) for layer in (self.k, self.v))
        return x + self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


QUERIES = {"*.q": "colwise", "*.o": "rowwise"}
SHARED = {"*.k": "replicated_with_grad_allreduce", "*.v": "replicated_with_grad_allreduce"}
UNDECLARED = {
    "of a parameter": (
        QUERIES | SHARED,
        r"0\.scale works on slices, and its gradient has to be summed \('replicated_with_grad_allreduce'\)",
    ),
    "of a layer": (
        QUERIES | {"*": "replicated_with_grad_allreduce"},
        r"0\.k is whole, but what reads it works on slices",
    ),
}


@pytest.mark.parametrize("what", UNDECLARED)
def test_gradients_that_a_plan_forgets_to_sum_are_named(what: str) -> None:
    """The worst mistake there is: the loss is right, and what is trained is not."""
    plan, message = UNDECLARED[what]
    reading = ModelReading(nn.Sequential(MultiQuery(), MultiQuery(), MultiQuery()))
    with pytest.raises(PlanError, match=message):
        plan_and_resolve(reading, plan, 2)
    plan_and_resolve(reading, QUERIES | SHARED | {"*": "replicated_with_grad_allreduce"}, 2)


def counted_plan() -> dict[str, str]:
    counted_plan.calls += 1  # type: ignore[attr-defined]
    return HEADS | NEURONS


def test_a_plan_function_is_called_once() -> None:
    counted_plan.calls = 0  # type: ignore[attr-defined]
    reading = ModelReading(_tiny("llama"))
    decided = decide(reading, ParallelConfig(plan=f"{__name__}.counted_plan"), tp=2, fsdp2=True)
    assert decided.plan is not None
    assert decided.plan.source == f"custom: {__name__}.counted_plan"
    assert counted_plan.calls == 1  # type: ignore[attr-defined]
