"""What a sharded model hands out beside loss and logits, and a sharded model in the hands of ``torch.compile``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from steps import assert_same, assert_same_gradients
from tiny_models import batch, build

from shardwright import ParallelConfig, parallelize
from shardwright.verify.ranks import RankPool, shared_mesh

CONFIGS = (ParallelConfig(tp=2), ParallelConfig(tp=2, sequence_parallel=True))
EAGER = {"attn_implementation": "eager"}


def _attention_weights(family: str) -> None:
    for config in CONFIGS:
        model, reference = build(family, **EAGER), build(family, **EAGER)
        parallelize(model, config, shared_mesh(config))
        for each in (model, reference):
            out = each(**batch(0), output_attentions=True)
            assert [tuple(weights.shape) for weights in out.attentions] == [(2, 4, 15, 15)] * 2
            (out.loss + sum(weights.square().sum() for weights in out.attentions)).backward()
        assert_same_gradients(model, reference, f"{family} {config}")
        given: dict[str, Any] = {"input_ids": batch(0)["input_ids"], "output_attentions": True, "return_dict": False}
        for ours, theirs in zip(model(**given)[-1], reference(**given)[-1], strict=True):
            assert_same(ours, theirs, f"{family} {config} as a tuple")


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_attention_weights_of_all_heads(ranks2: RankPool, family: str) -> None:
    ranks2.run(_attention_weights, family)


def _compiled_as_a_whole() -> None:
    for config in CONFIGS:
        model, reference = build("qwen3"), build("qwen3")
        parallelize(model, config, shared_mesh(config))
        torch.compile(model, backend="aot_eager")(**batch(0)).loss.backward()
        reference(**batch(0)).loss.backward()
        assert_same_gradients(model, reference, str(config))


def test_a_model_that_is_compiled_as_a_whole(ranks2: RankPool) -> None:
    ranks2.run(_compiled_as_a_whole)
