"""Embedding and head as FSDP2 units of their own: exact, gathered only while they run, refused where that cannot be."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from steps import assert_same_gradients
from tiny_models import assert_exact, batch, build, measure
from torch import nn
from torch.distributed.fsdp import FSDPModule

from shardwright import ParallelConfig, parallelize
from shardwright._torch import groups_of, states_of
from shardwright.distributed.parallelizer import unshard_fsdp2_model
from shardwright.errors import PlanError
from shardwright.verify.ranks import RankPool, shared_mesh

ENDS = ParallelConfig(dp_shard=2, shard_ends=True)
BOTH = ENDS.with_(tp=2)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", BOTH),
        ("qwen3", BOTH.with_(sequence_parallel=True)),
        ("gemma2", BOTH.with_(sequence_parallel=True, activation_checkpointing="full")),
        ("phi3", BOTH.with_(sequence_parallel=True, reshard_after_forward="always", prefetch=2)),
        ("llama", BOTH.with_(sequence_parallel=True, compile="aot_eager")),
        ("mistral", ENDS.with_(dp_replicate=2)),
    ],
    ids=["tp", "tp+sp", "tp+sp+ac", "tp+sp always prefetch", "tp+sp compiled", "hsdp"],
)
def test_a_whole_step(ranks4: RankPool, family: str, config: ParallelConfig) -> None:
    """An odd vocabulary, two accumulated micro-batches, clipping, AdamW; from meta."""
    assert_exact(measure(ranks4, family, config, meta=True, tie_word_embeddings=False))


def _gathered(model: nn.Module) -> list[str]:
    names = ("model.embed_tokens", "lm_head")
    groups = {name: groups_of(state) for name in names for state in states_of(model.get_submodule(name))}
    return [name for name in names if any(group.is_unsharded for group in groups[name])]


def _only_while_they_run() -> None:
    for reshard, kept in (("default", ["lm_head"]), ("always", []), ("never", ["model.embed_tokens", "lm_head"])):
        model = parallelize(build("llama"), ENDS.with_(reshard_after_forward=reshard), shared_mesh(ENDS))
        assert isinstance(model.model.embed_tokens, FSDPModule)
        assert isinstance(model.lm_head, FSDPModule)
        seen: list[list[str]] = []
        model.model.layers[0].register_forward_pre_hook(
            lambda module, args, seen=seen, m=model: seen.append(_gathered(m))
        )
        loss = model(**batch(0)).loss
        assert seen == [[name for name in kept if name == "model.embed_tokens"]], reshard
        assert _gathered(model) == kept, reshard
        loss.backward()
        assert _gathered(model) == [], reshard


def test_they_are_gathered_only_while_they_run(ranks2: RankPool) -> None:
    ranks2.run(_only_while_they_run)


def _generation() -> None:
    reference = build("llama").eval()
    model: Any = parallelize(copy.deepcopy(reference), ENDS, shared_mesh(ENDS)).eval()
    ids = batch(2, length=5)["input_ids"].clamp(min=3)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = reference.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options), expected)
    with unshard_fsdp2_model(model):
        assert torch.equal(model.generate(ids, **options), expected)
    assert _gathered(model) == []
    for each in (model, reference):
        each.train()(**batch(0)).loss.backward()
    assert_same_gradients(model, reference)


def test_generation(ranks2: RankPool) -> None:
    ranks2.run(_generation)


def _refused() -> None:
    model = build("llama", tie_word_embeddings=True)
    with pytest.raises(PlanError, match=r"model\.embed_tokens\.weight and lm_head\.weight are one parameter"):
        parallelize(model, ENDS, shared_mesh(ENDS))
    with pytest.raises(PlanError, match="shard_ends needs the input embedding of Sequential"):
        parallelize(nn.Sequential(nn.Linear(4, 4)), ENDS, shared_mesh(ENDS))
    assert type(model.lm_head.weight) is nn.Parameter  # untouched


def test_what_cannot_be_is_refused(ranks2: RankPool) -> None:
    ranks2.run(_refused)
