"""Context parallelism whose attention exchanges parts of the sequence for parts of the heads, against one process."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tiny_models import assert_exact, batch, build
from torch import Tensor

from shardwright import ParallelConfig
from shardwright.distributed.planning.context import plan_context
from shardwright.distributed.planning.context_method import ContextMethod
from shardwright.distributed.replay.reading import ModelReading
from shardwright.errors import ConfigError, PlanError
from shardwright.verify.public import case_of, verify
from shardwright.verify.ranks import RankPool

BY_HEADS = ParallelConfig(cp=2, dp_shard=1, context_method="ulysses")
AUTO = BY_HEADS.with_(context_method="auto")


def padded(index: int) -> dict[str, Tensor]:
    """Thirteen positions, which the ranks do not divide, and padding on either side."""
    made = batch(index, rows=3, length=13)
    mask = torch.ones_like(made["input_ids"])
    mask[0, :4], mask[1, -5:] = 0, 0
    return {**made, "attention_mask": mask, "labels": made["labels"].masked_fill(mask == 0, -100)}


def packed(index: int) -> dict[str, Any]:
    positions = torch.cat([torch.arange(6), torch.arange(9)]).expand(2, -1).clone()
    return {**batch(index, length=15), "position_ids": positions, "use_cache": False}


CASES: dict[str, tuple[str, dict[str, Any], Any, ParallelConfig]] = {
    "causal": ("llama", {}, batch, BY_HEADS),
    "fewer keys than ranks": ("llama", {"num_key_value_heads": 1}, padded, BY_HEADS),
    "windows": ("gemma3_text", {}, padded, BY_HEADS),
    "packed": ("qwen3", {}, packed, BY_HEADS),
    "recomputed": ("qwen3", {}, padded, BY_HEADS.with_(activation_checkpointing="selective")),
}


# DeepSeek V3, below, is causal without a mask, too.
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.sweep if case == "causal" else ()) for case in CASES]
)
def test_batches(ranks2: RankPool, case: str) -> None:
    family, changes, made, config = CASES[case]
    assert_exact(verify(partial(build, family, **changes), config, batch=made, accumulate=2, pool=ranks2), 0.0)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "t5", "bert"])
def test_types(ranks2: RankPool, model_type: str) -> None:
    """Keys and values of different sizes; cross-attention and relative biases; bidirectional attention."""
    assert_exact(verify(model_type, AUTO, accumulate=2, pool=ranks2), 0.0)


def test_on_four_ranks(ranks4: RankPool) -> None:
    """Two key-value heads for four ranks, and heads that tensor parallelism has spread before."""
    four = BY_HEADS.with_(cp=4)
    assert_exact(verify(partial(build, "llama"), four, batch=padded, accumulate=2, pool=ranks4), 0.0)
    both = BY_HEADS.with_(tp=2, sequence_parallel=True)
    assert_exact(verify(partial(build, "llama"), both, batch=padded, accumulate=2, pool=ranks4), 0.5)


def methods(model_type: str, asked: str, **degrees: int) -> dict[str, str]:
    """What the plan says of every attention, by the name of its class in the model: method and reason."""
    plan = plan_context(ModelReading(case_of(model_type, AUTO).build()), ContextMethod(asked, **degrees))
    return {f"{name.rpartition('.')[2]}: {use.method}": use.why for name, use in plan.attention.items()}


def test_auto_says_which_and_why() -> None:
    assert methods("qwen3", "auto") == {"self_attn: ulysses": "4 heads over tp 1 x cp 2"}
    assert methods("gpt_oss", "auto") == {
        "self_attn: gather": "no exchange of heads: its kernel is eager, which hands out weights for every pair of "
        "positions"
    }
    assert methods("t5", "auto")["EncDecAttention: gather"] == "they come from outside of the block"
    assert set(methods("qwen3", "auto", cp=3)) == {"self_attn: gather"}
    notes = list(plan_context(ModelReading(build("qwen3")), ContextMethod("auto")).notes())
    assert "model.layers.*.self_attn exchanges positions for heads (4 heads over tp 1 x cp 2)." in notes[0]


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(PlanError, match=r"self_attn cannot attend.*4 heads, which tp 2 x cp 4 = 8 ranks do not divide"):
        methods("qwen3", "ulysses", cp=4, tp=2)
    with pytest.raises(PlanError, match=r"its kernel is eager.*Set it to auto"):
        methods("gpt_oss", "ulysses")
    with pytest.raises(ConfigError, match=r"context_method is 'ring'.*gather, ulysses, auto"):
        ParallelConfig(cp=2, context_method="ring")
