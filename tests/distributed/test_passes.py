"""Loops in which forward, backward and optimizer do not simply take turns: right in every way of sharding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from loops import LOOPS, evaluate, loss, train
from tiny_models import build
from torch import nn

from shardwright import ParallelConfig, parallelize
from shardwright._torch import groups_of, states_of
from shardwright.verify.ranks import RankPool, shared_mesh

FSDP = ParallelConfig(dp_shard=2)
TP_FSDP = FSDP.with_(tp=2)
RECOMPUTED = {"activation_checkpointing": "full", "reshard_after_forward": "never"}


def _parallel(config: ParallelConfig) -> nn.Module:
    return parallelize(build("llama"), config, shared_mesh(config))


def _same_numbers(loops: tuple[Callable[[nn.Module], list[float]], ...], config: ParallelConfig) -> None:
    for loop in loops:
        found, expected = loop(_parallel(config)), loop(build("llama"))
        assert found == pytest.approx(expected, abs=2e-6), f"{loop.__name__}, {config}"


@pytest.mark.parametrize(
    "config",
    [
        FSDP,
        FSDP.with_(reshard_after_forward="always", activation_checkpointing="every_2"),
        FSDP.with_(**RECOMPUTED),
        FSDP.with_(shard_ends=True, prefetch=2, keep_gathered_gib=1e-5),
        ParallelConfig(dp_replicate=2, dp_shard=1),
        ParallelConfig(tp=2),
    ],
    ids=["fsdp2", "always, recomputed in part", "never, recomputed", "ends, prefetch", "replicas", "tp"],
)
def test_two_ranks(config: ParallelConfig, ranks2: RankPool) -> None:
    ranks2.run(_same_numbers, LOOPS, config)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(TP_FSDP, id="tp", marks=pytest.mark.sweep),
        pytest.param(TP_FSDP.with_(sequence_parallel=True, **RECOMPUTED), id="tp+sp never, recomputed"),
        pytest.param(FSDP.with_(dp_replicate=2), id="hsdp"),
    ],
)
def test_four_ranks(config: ParallelConfig, ranks4: RankPool) -> None:
    ranks4.run(_same_numbers, LOOPS, config)


def _gathered(model: nn.Module) -> int:
    return sum(group.is_unsharded for state in states_of(model) for group in groups_of(state))


def _what_is_left() -> None:
    model = _parallel(FSDP)
    evaluate(model)
    assert _gathered(model) == 0
    pending = loss(model)
    assert _gathered(model) == 2, "the root and the last block wait for backward"
    pending.backward()
    assert _gathered(model) == 0


def test_nothing_is_left_gathered_without_a_backward_to_come(ranks2: RankPool) -> None:
    ranks2.run(_what_is_left)


def _mixed_precision() -> None:
    """Where all was frozen when FSDP2 first looked: in which dtype gradients are reduced is found again."""
    config = FSDP.with_(precision="bf16")
    model, other = _parallel(config), _parallel(config)
    model.requires_grad_(False)
    evaluate(model)
    model.requires_grad_(True)
    assert train(model, 3) == train(other, 3)
    assert {param.grad.dtype for param in model.parameters()} == {torch.float32}


def test_unfrozen_in_mixed_precision(ranks2: RankPool) -> None:
    ranks2.run(_mixed_precision)
