"""Three AdamW steps on ranks against the same in one process: losses, gradient norms and every parameter."""

from __future__ import annotations

from typing import Any

import pytest
from training import Case, compare, gradients

from shardwright.verify.ranks import RankPool

STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")


def check(
    pool: RankPool, strategy: str = "optim_grads_params", options: dict[str, Any] | None = None, **case: Any
) -> None:
    every = {"data_parallel_sharding_strategy": strategy, **(options or {})}
    for difference in pool.run(compare, Case(every, **case)):
        assert difference.seen < 2e-6
        assert difference.parameters < 2e-5  # AdamW divides by the size of a gradient, also of one that is noise
        assert difference.moved > 1e-3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_steps(ranks2: RankPool, strategy: str) -> None:
    check(ranks2, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_plain_loop_with_accumulation_and_clipping(ranks2: RankPool, strategy: str) -> None:
    """Nothing of this engine is called but the sharding; gradients are zeroed in place."""
    check(ranks2, strategy, optimizer="bare", accumulation=2, clip=0.5, set_to_none=False)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ties_and_frozen_parts(ranks2: RankPool, strategy: str) -> None:
    check(
        ranks2, strategy, optimizer="attached", accumulation=2, tied=strategy != "optim_grads", frozen=True, inner=True
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_tensor_parallel(ranks4: RankPool, strategy: str) -> None:
    check(ranks4, strategy, tp=2, accumulation=2, clip=0.5, tied=strategy == "optim_grads_params")


@pytest.mark.parametrize("strategy", ["no_shard", "optim_grads_params"])
def test_one_data_parallel_rank(ranks2: RankPool, strategy: str) -> None:
    check(ranks2, strategy, tp=2, accumulation=2)


@pytest.mark.parametrize("plan", ["torch", "sequence"])
@pytest.mark.parametrize("strategy", ["optim", "optim_grads_params"])
def test_other_tensor_parallel_plans(ranks4: RankPool, strategy: str, plan: str) -> None:
    check(ranks4, strategy, tp=2, plan=plan, accumulation=2, clip=0.5)


@pytest.mark.parametrize(("strategy", "plan"), [("no_shard", "ours"), ("optim_grads_params", "torch")])
def test_gradients(ranks4: RankPool, strategy: str, plan: str) -> None:
    assert max(ranks4.run(gradients, strategy, 2, plan)) < 1e-5


@pytest.mark.parametrize("tp", [1, 2])
def test_context_parallel_axis_is_sharded_over_too(ranks4: RankPool, tp: int) -> None:
    check(ranks4, cp=2, tp=tp)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_overlap(ranks2: RankPool, strategy: str) -> None:
    check(
        ranks2,
        strategy,
        {"overlap_grad_reduce": False, "overlap_param_gather": False},
        optimizer="bare",
        accumulation=2,
    )


@pytest.mark.parametrize("strategy", ["optim", "optim_grads_params"])
def test_float32_copies(ranks2: RankPool, strategy: str) -> None:
    check(ranks2, strategy, {"grad_reduce_in_fp32": True, "preserve_fp32_weights": True}, accumulation=2)


@pytest.mark.parametrize("strategy", ["no_shard", "optim"])
@pytest.mark.parametrize("option", ["average_in_collective", "calculate_per_token_loss"])
def test_sums_and_means(ranks2: RankPool, strategy: str, option: str) -> None:
    check(ranks2, strategy, {option: True}, accumulation=2, summed=option == "calculate_per_token_loss")


def test_one_bucket(ranks2: RankPool) -> None:
    check(ranks2, options={"disable_bucketing": True}, optimizer="bare")


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing(ranks2: RankPool, mode: str) -> None:
    check(ranks2, checkpointing=mode, tp=2 if mode == "selective" else 1)


def test_compiled_blocks(ranks2: RankPool) -> None:
    check(ranks2, compile=True)
