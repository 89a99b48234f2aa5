"""Derived plans beside those that transformers brings along: as much cut, and as few collectives.

``REASONS`` lists where the two differ; what a derived plan cuts beyond transformers' costs collectives.
"""

from __future__ import annotations

import pytest
import transformers
from packaging.version import Version
from torch import nn

from shardwright.distributed.config import ParallelConfig
from shardwright.distributed.planning.derive import derive_plan
from shardwright.distributed.planning.expert_rules import with_experts
from shardwright.distributed.planning.resolve import resolve, sharded_fraction
from shardwright.distributed.planning.resolved import ResolvedPlan
from shardwright.distributed.planning.sources import huggingface_plan
from shardwright.distributed.replay.reading import ModelReading
from shardwright.estimate.traffic import predict_traffic
from shardwright.verify.public import case_of

EQUAL = [
    "arcee",
    "aya_vision",
    "cohere",
    "cohere2",
    "cohere_compass_text",
    "cwm",
    "deepseek_vl",
    "ernie4_5",
    "gemma",
    "gemma2",
    "glm",
    "glm4",
    "glm4v",
    "gpt_neox",
    "granite",
    "helium",
    "hyperclovax",
    "internlm3",
    "iquestcoder",
    "jais2",
    "llama",
    "llama4_text",
    "llava",
    "mistral",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "starcoder2",
]
NOT_IN_OLDEST = {"cohere_compass_text", "internlm3", "iquestcoder"}  # transformers 5.17 cannot build them
MLA = "transformers leaves the low-rank projections of multi-head latent attention whole; they are gathered here"
REASONS = {
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "minicpm3": MLA,
    "qwen2_moe": "transformers leaves the shared expert whole",
}


def plans_of(model_type: str) -> tuple[nn.Module, ResolvedPlan, ResolvedPlan]:
    """A tiny model, transformers' plan for two ranks, and the one that is read off its code."""
    if model_type in NOT_IN_OLDEST and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("this version of transformers cannot build it")
    model = case_of(model_type, ParallelConfig(tp=2)).build()
    theirs = huggingface_plan(model)
    if theirs is None:
        pytest.skip("this version of transformers has no plan for it")
    ours = with_experts(model, derive_plan(model, tp=2), 2)
    return model, resolve(ModelReading(model), theirs, 2), resolve(ModelReading(model), ours, 2)


def collectives(model: nn.Module, resolved: ResolvedPlan) -> int:
    """In a forward and a backward."""
    return sum(map(len, predict_traffic(ModelReading(model), resolved, 4).values()))


@pytest.mark.parametrize("model_type", EQUAL)
def test_as_good(model_type: str) -> None:
    model, theirs, ours = plans_of(model_type)
    assert collectives(model, ours) <= collectives(model, theirs)
    assert sharded_fraction(ModelReading(model), ours) >= sharded_fraction(ModelReading(model), theirs)


@pytest.mark.parametrize("model_type", REASONS)
def test_more_is_cut(model_type: str) -> None:
    model, theirs, ours = plans_of(model_type)
    assert sharded_fraction(ModelReading(model), ours) > sharded_fraction(ModelReading(model), theirs) + 0.01
    assert collectives(model, ours) > collectives(model, theirs)
