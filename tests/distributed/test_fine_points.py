"""Sizes, heads, biases and paddings at which tensor parallelism goes wrong easily: all exact, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from tiny_models import assert_exact, batch, build, measure
from torch import nn

from shardwright import ParallelConfig
from shardwright.errors import PlanError
from shardwright.verify.ranks import RankPool
from shardwright.verify.run import Case, run_case

TP2 = ParallelConfig(tp=2)
SP2 = ParallelConfig(tp=2, sequence_parallel=True)
BOTH = pytest.mark.parametrize("config", [TP2, SP2], ids=["tp", "tp+sp"])


def tp(size: int, sequence_parallel: bool = False) -> ParallelConfig:
    return ParallelConfig(tp=size, dp_shard=1, sequence_parallel=sequence_parallel)


# Lengths and widths that the ranks do not divide


@pytest.mark.parametrize("length", [1, 2, 3, 5])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_sequence_lengths_that_four_ranks_do_not_divide(ranks4: RankPool, family: str, length: int) -> None:
    # One token has no next token to predict: the loss is then the user's own (each token predicts itself).
    case = Case(partial(with_own_loss, family), partial(batch, length=length), tp(4, True), 2)
    report = ranks4.run(run_case, case)[0]
    if length == 1:
        # Softmax over one key is constant: the queries' gradients are rounding alone, and only float64 tells how much.
        assert report.exact, report
    else:
        assert_exact(report)


def with_own_loss(family: str) -> nn.Module:
    model = build(family)
    model.forward = _OwnLossForward(type(model).forward, model)  # type: ignore[method-assign]
    return model


@dataclass
class _OwnLossForward:
    """A forward set on the instance, as libraries that patch models do it."""

    forward: Any
    model: nn.Module

    def __call__(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.forward(self.model, input_ids=input_ids).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), input_ids.flatten())
        return {"loss": loss, "logits": logits}


@BOTH
@pytest.mark.parametrize("vocabulary", [81, 99, 100])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_vocabularies(ranks2: RankPool, config: ParallelConfig, vocabulary: int, tied: bool) -> None:
    assert_exact(measure(ranks2, "llama", config, vocab_size=vocabulary, tie_word_embeddings=tied), 0.99)


@pytest.mark.parametrize("vocabulary", [97, 98, 99])
def test_vocabularies_over_four_ranks(ranks4: RankPool, vocabulary: int) -> None:
    assert_exact(
        measure(ranks4, "gemma2", tp(4), vocab_size=vocabulary, tie_word_embeddings=True, num_key_value_heads=4)
    )


@BOTH
@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("width", [45, 7])
def test_intermediate_sizes(ranks4: RankPool, config: ParallelConfig, family: str, width: int) -> None:
    assert_exact(measure(ranks4, family, config.with_(dp_shard=2), intermediate_size=width))


def test_a_packed_width_that_the_ranks_do_not_divide_is_refused(ranks2: RankPool) -> None:
    with pytest.raises(PlanError, match=r"gate_up_proj.*45 features.*2 tensor-parallel ranks"):
        measure(ranks2, "phi3", TP2, intermediate_size=45)


# Heads


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "tp+sp"])
@pytest.mark.parametrize(
    ("family", "query", "key_value", "size", "more"),
    [
        ("llama", 4, 1, 2, {}),
        ("qwen3", 4, 1, 2, {}),
        ("gemma", 4, 1, 2, {}),
        ("phi3", 4, 1, 2, {}),
        ("llama", 8, 1, 4, {}),
        ("qwen3", 4, 2, 4, {}),
        ("gemma3_text", 4, 2, 4, {}),
        ("phi3", 4, 2, 4, {}),
        ("llama", 8, 2, 4, {"attention_bias": True}),
        ("qwen2", 8, 2, 4, {}),  # has q, k and v biases
        ("llama", 12, 3, 2, {"hidden_size": 96}),
        ("qwen3", 12, 3, 2, {"attention_bias": True}),
        ("llama", 12, 3, 4, {"hidden_size": 96}),
    ],
)
def test_fewer_key_value_heads_than_the_ranks_need(
    request: pytest.FixtureRequest,
    family: str,
    query: int,
    key_value: int,
    size: int,
    more: dict[str, Any],
    sequence_parallel: bool,
) -> None:
    pool = request.getfixturevalue("ranks2" if size == 2 else "ranks4")
    # phi3 has no head_dim of its own: hidden_size / heads.
    more = {"hidden_size": query * 8, **more} if family == "phi3" else more
    config = tp(size, sequence_parallel)
    report = measure(pool, family, config, num_attention_heads=query, num_key_value_heads=key_value, **more)
    assert_exact(report, 0.6)


@pytest.mark.parametrize(
    ("query", "key_value", "size", "largest"), [(6, 6, 4, 3), (5, 1, 2, 1), (9, 3, 2, 1), (10, 2, 4, 2)]
)
def test_query_heads_that_do_not_divide_are_refused(
    request: pytest.FixtureRequest, query: int, key_value: int, size: int, largest: int
) -> None:
    pool = request.getfixturevalue("ranks2" if size == 2 else "ranks4")
    heads = {"num_attention_heads": query, "num_key_value_heads": key_value, "hidden_size": query * 8}
    with pytest.raises(PlanError, match=rf"{query} attention heads.*{key_value} key-value.*tp={size}.* is {largest}\."):
        measure(pool, "llama", tp(size), **heads)


# Biases


@BOTH
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"attention_bias": True}),
        ("gemma3_text", {"attention_bias": True}),
    ],
)
def test_biases(ranks2: RankPool, config: ParallelConfig, family: str, more: dict[str, Any]) -> None:
    """A row-parallel layer's bias is added once, and its gradient is counted once, also on a split sequence."""
    assert_exact(measure(ranks2, family, config, **more), 0.99)


# Padding


@BOTH
@pytest.mark.parametrize("padding", [0, 49, 50, 98])
def test_a_padding_row_gets_no_gradient_on_whichever_rank_it_lies(
    ranks2: RankPool, config: ParallelConfig, padding: int
) -> None:
    report = measure(ranks2, "llama", config, pad_token_id=padding)
    assert_exact(report, 0.99)


def padded_batch(index: int) -> dict[str, torch.Tensor]:
    """Left and right padding, with as many targets in every batch."""
    whole = batch(index)
    ids, labels = whole["input_ids"], whole["labels"]
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[1, -4:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("config", [TP2, SP2, SP2.with_(activation_checkpointing="full")], ids=["tp", "sp", "sp+ac"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_padded_batches(ranks2: RankPool, config: ParallelConfig, family: str) -> None:
    """Masks and positions are those of the whole sequence, though the residual stream is split."""
    assert_exact(ranks2.run(run_case, Case(partial(build, family), padded_batch, config, 2))[0])


def packed_batch(index: int) -> dict[str, torch.Tensor]:
    """Two documents in one row, told apart by their positions alone."""
    positions = torch.cat([torch.arange(6), torch.arange(9)]).expand(2, -1)
    return {**batch(index), "position_ids": positions}


@BOTH
def test_packed_documents(ranks2: RankPool, config: ParallelConfig) -> None:
    assert_exact(ranks2.run(run_case, Case(partial(build, "llama"), packed_batch, config, 2))[0])


def embedded_batch(index: int) -> Mapping[str, torch.Tensor]:
    whole = batch(index)
    generator = torch.Generator().manual_seed(index)
    return {"inputs_embeds": torch.randn(2, 15, 32, generator=generator), "labels": whole["labels"]}


@BOTH
def test_embeddings_handed_in(ranks2: RankPool, config: ParallelConfig) -> None:
    """The embedding layer is not called at all, and gets no gradient, as in one process."""
    assert_exact(ranks2.run(run_case, Case(partial(build, "llama"), embedded_batch, config, 1))[0])


# What the logits go through


@BOTH
@pytest.mark.parametrize("cap", [2.0, None])
def test_logit_soft_capping(ranks2: RankPool, config: ParallelConfig, cap: float | None) -> None:
    assert_exact(measure(ranks2, "gemma2", config, final_logit_softcapping=cap), 0.99)


# Other shapes of the same architectures


@BOTH
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {"num_hidden_layers": 1}),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"]}),
        ("phi3", {"partial_rotary_factor": 0.5}),
        ("llama", {"attn_implementation": "eager"}),
    ],
)
def test_variants(ranks2: RankPool, config: ParallelConfig, family: str, more: dict[str, Any]) -> None:
    assert_exact(measure(ranks2, family, config, **more), 0.99)
