"""Experts that are modules in a list, on ranks of their own: the same function as one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from expert_mixtures import (
    Balanced,
    Behind,
    ByHits,
    ByMask,
    ByName,
    ByRepeating,
    Capacity,
    EveryToken,
    Recomputing,
    Shared,
    WeightsInside,
    WithoutGradients,
    favouring,
    model_with,
)
from steps import assert_same, assert_same_gradients, assert_same_parameters
from torch import nn

from shardwright import ParallelConfig, parallelize
from shardwright.distributed.runtime import collectives as c
from shardwright.errors import UnsupportedError
from shardwright.verify import verify
from shardwright.verify.ranks import RankPool, shared_mesh
from shardwright.verify.step import full

EP2 = ParallelConfig(dp_shard=2, ep=2)
OVER_CP = ParallelConfig(dp_shard=1, cp=2, ep=2)
OVER_TP = ParallelConfig(dp_shard=1, tp=2, ep=2, sequence_parallel=True)


def text(number: int) -> Mapping[str, torch.Tensor]:
    ids = torch.randint(64, (2, 11), generator=torch.Generator().manual_seed(number))
    return {"input_ids": ids, "labels": ids}


def _same(make: Callable[[], nn.Module], config: ParallelConfig) -> None:
    """Two micro-batches of each data-parallel rank, a clipped step, and an evaluation after it."""
    shares = config.degrees(dist.get_world_size())
    ranks = shares.dp_replicate * shares.dp_shard
    mine = dist.get_rank() // (dist.get_world_size() // ranks)
    reference, model = make(), parallelize(make(), config, shared_mesh(config))
    what = f"{[type(layer.mlp).__name__ for layer in reference.model.layers]}, {config}"  # type: ignore[union-attr]
    for micro in range(2):
        for rank in range(ranks):
            (reference(**text(2 * rank + micro)).loss / ranks).backward()
        model(**text(2 * mine + micro)).loss.backward()
    assert_same_gradients(model, reference, what)
    for each in (model, reference):
        nn.utils.clip_grad_norm_(each.parameters(), 0.5)
        torch.optim.AdamW(each.parameters(), lr=1e-2, eps=1e-2).step()
        each.eval()
    assert_same_parameters(model, reference, what)
    for (name, buffer), (_, expected) in zip(model.named_buffers(), reference.named_buffers(), strict=True):
        assert_same(buffer, expected, f"{what}: {name}")
    with torch.no_grad():
        assert_same(full(model(**text(9)).logits), reference(**text(9)).logits, what)


PAIRS = ((ByMask, ByHits), (ByRepeating, EveryToken), (ByName, Behind), (WeightsInside, Capacity))


def _every_form() -> None:
    for turn, pair in enumerate(PAIRS):
        _same(partial(model_with, *pair), OVER_TP if turn % 2 else EP2)
    _same(partial(model_with, WithoutGradients, WeightsInside), EP2.with_(activation_checkpointing="selective"))
    _same(partial(model_with, ByHits, Capacity), OVER_CP)
    _same(partial(model_with, Shared, Balanced), OVER_TP.with_(activation_checkpointing="full"))


def test_every_form_in_which_code_calls_experts(ranks2: RankPool) -> None:
    ranks2.run(_every_form)


def _frozen(make: Callable[[], nn.Module], which: str) -> nn.Module:
    model = make()
    for name, param in model.named_parameters():
        param.requires_grad_(which not in name)
    return model


def _favoured() -> nn.Module:
    return favouring(model_with(ByHits, ByMask), 2)


def _with_adapters() -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "gate_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(model_with(ByHits), config)


def _odd_ones() -> None:
    """A rank that no token comes to; experts that have no gradient; some that are frozen; adapters on all."""
    _same(_favoured, EP2)
    for which in ("experts.1", "experts", "embed_tokens"):
        _same(partial(_frozen, partial(model_with, ByHits), which), EP2)
    reference, model = _with_adapters(), parallelize(_with_adapters(), EP2, shared_mesh(EP2))
    for rank in range(2):
        (reference(**text(rank)).loss / 2).backward()
    model(**text(dist.get_rank())).loss.backward()
    assert_same_gradients(model, reference, "adapters")
    loss = parallelize(model_with(Recomputing), EP2, shared_mesh(EP2))(**text(dist.get_rank())).loss
    with pytest.raises(UnsupportedError, match=r"An expert \(Expert\) is called .* once more in backward"):
        loss.backward()


def test_experts_without_tokens_or_gradients(ranks2: RankPool) -> None:
    ranks2.run(_odd_ones)


def _collectives() -> tuple[list[int], list[int], tuple[int, ...]]:
    """All-to-alls in forward and in backward, gathers in forward, and the shape of a weight between steps."""
    model: Any = parallelize(model_with(ByMask, ByMask), EP2, shared_mesh(EP2))
    shape = tuple(model.get_parameter("model.layers.0.mlp.experts.0.up_proj.weight").to_local().shape)
    exchanges, gathers = [], []

    def counted(calls: list[int], call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any) -> Any:
            calls[-1] += 1
            return call(*args)

        return counting

    with (
        patch.object(c, "all_to_all", counted(exchanges, c.all_to_all)),
        patch.object(c, "all_gather", counted(gathers, c.all_gather)),
    ):
        exchanges.append(0)
        gathers.append(0)
        loss = model(**text(dist.get_rank())).loss
        exchanges.append(0)
        gathers.append(0)
        loss.backward()
    return exchanges, gathers, shape


def test_what_travels(ranks2: RankPool) -> None:
    """Forward: counts, weights, tokens, results. Backward: the last three. At rest a rank has half of each expert."""
    layers = 2
    assert ranks2.run(_collectives) == [([3 * layers, 3 * layers], [layers, 0], (12, 32))] * 2


def test_four_ranks(ranks4: RankPool) -> None:
    """Experts are sharded over data-parallel and over tensor-parallel ranks, recomputed, and found in the report."""
    config = ParallelConfig(dp_shard=2, tp=2, ep=2, sequence_parallel=True, activation_checkpointing="full")
    report = verify(partial(model_with, ByHits, ByRepeating), config, batch=text, accumulate=2, pool=ranks4)
    assert report.exact, report.summary()
    assert report.spread_fraction > 0.4
    assert report.expert_grad_rel_err is not None
    assert report.router_grad_rel_err is not None
