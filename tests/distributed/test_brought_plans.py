"""Plans that a model brings along under the names that transformers uses, and plans that are passed on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tiny_models import build
from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from transformers import GPT2Config, GPT2LMHeadModel

from shardwright.distributed.parallelizer import _get_parallel_plan, get_hf_tp_shard_plan
from shardwright.distributed.planning.tensor import plan_and_resolve
from shardwright.distributed.replay.reading import ModelReading
from shardwright.errors import PlanError


def _with_a_plan(*, tied: bool) -> Any:
    """A module that is not transformers' but brings plans along as transformers' do."""
    model: Any = nn.Module()
    model.config = SimpleNamespace(tie_word_embeddings=tied)
    model.model = nn.Module()
    model._tp_plan = {"layers.0.q_proj": "rowwise", "lm_head": "colwise_rep"}
    return model


def test_plan_of_a_model_that_is_not_of_transformers() -> None:
    plan = get_hf_tp_shard_plan(_with_a_plan(tied=False))
    assert isinstance(plan["layers.0.q_proj"], RowwiseParallel)
    assert isinstance(plan["model.embed_tokens"], RowwiseParallel)
    assert plan["lm_head"].use_local_output is False
    model = _with_a_plan(tied=False)
    model.model._tp_plan = {"layers.0.v_proj": "colwise_rep"}
    assert isinstance(get_hf_tp_shard_plan(model)["model.layers.0.v_proj"], ColwiseParallel)
    model = _with_a_plan(tied=False)
    model.language_model = nn.Module()
    model.language_model._tp_plan = {"layers.0.v_proj": "sequence_parallel"}
    assert {"language_model.layers.0.v_proj", "language_model.embed_tokens"} <= set(get_hf_tp_shard_plan(model))


def test_the_ends_of_a_tied_stand_in_stay_as_they_are() -> None:
    plan = get_hf_tp_shard_plan(_with_a_plan(tied=True))
    assert list(plan) == ["layers.0.q_proj", "lm_head"]
    assert plan["lm_head"].output_layouts == (Replicate(),)


def test_a_bad_style_in_a_plan_that_a_model_brings_along() -> None:
    model = _with_a_plan(tied=True)
    model._tp_plan = {"layers.0.q_proj": "invalid"}
    with pytest.raises(ValueError, match="Unknown parallel style"):
        get_hf_tp_shard_plan(model)


def test_plans_of_several_variants_can_be_passed_in_again() -> None:
    """transformers writes one plan for all variants, so a plan that was returned may name what a model lacks."""
    model = build("llama")
    model._tp_plan = {**model._tp_plan, "model.layers.*.self_attn.gate_proj": "colwise"}
    for plan in (get_hf_tp_shard_plan(model), _get_parallel_plan(model)):
        assert "model.layers.*.self_attn.gate_proj" in plan
        resolved = plan_and_resolve(ModelReading(model), plan, 2)[1]
        assert resolved.modules["model.layers.1.mlp.up_proj"].style == "colwise"
    with pytest.raises(PlanError, match=r"'model\..*matches no module"):  # of another model
        plan_and_resolve(ModelReading(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2))), plan, 2)


@pytest.mark.parametrize("family", ["phi3", "gpt2"])
def test_what_a_plan_says_beside_its_styles_comes_back_with_them(family: str) -> None:
    """Automodel's managers take a plan from one function and hand it to the other. These two make sizes rank-local."""
    model = build(family) if family == "phi3" else GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4))
    returned = {glob: style for glob, style in _get_parallel_plan(model).items()}  # noqa: C416 - a dict of its own
    expected = plan_and_resolve(ModelReading(model), None, 2)[1]
    resolved = plan_and_resolve(ModelReading(model), returned, 2)[1]
    assert resolved.attributes == expected.attributes != {}
    assert {name: use.style for name, use in resolved.modules.items()} == {
        name: use.style for name, use in expected.modules.items()
    }
