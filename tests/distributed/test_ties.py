"""Tied weights: tied before, tied after; one tensor, one gradient, one optimizer state."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_models import assert_exact, batch, build, load_whole
from torch import nn

from shardwright import ParallelConfig, parallelize
from shardwright.distributed.plan import ParallelPlan
from shardwright.distributed.planning.resolve import resolve
from shardwright.distributed.replay.reading import ModelReading
from shardwright.errors import PlanError
from shardwright.verify.ranks import RankPool, shared_mesh
from shardwright.verify.run import Case, run_case

TWO = (ParallelConfig(tp=2), ParallelConfig(tp=2, sequence_parallel=True), ParallelConfig(dp_shard=2))
FOUR = (ParallelConfig(tp=2, dp_shard=2), ParallelConfig(tp=2, dp_shard=2, sequence_parallel=True))


def config_says_tied_but_modules_are_not() -> nn.Module:
    model = build("llama", tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 0.9)
    return model


def config_says_untied_but_modules_are_tied() -> nn.Module:
    model = build("llama", tie_word_embeddings=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


@pytest.mark.parametrize("make", [config_says_tied_but_modules_are_not, config_says_untied_but_modules_are_tied])
def test_the_modules_decide_not_the_config(ranks2: RankPool, ranks4: RankPool, make: Any) -> None:
    for pool, configs in ((ranks2, TWO), (ranks4, FOUR)):
        for config in configs:
            assert_exact(pool.run(run_case, Case(make, partial(batch), config, 2))[0])


def _one_tensor() -> None:
    for config in TWO if dist.get_world_size() == 2 else FOUR:
        whole: Any = build("qwen3", tie_word_embeddings=True)
        with torch.device("meta"):
            empty = type(whole)(whole.config)
        for model in (build("qwen3", tie_word_embeddings=True), empty):
            names = [name for name, _ in model.named_parameters()]
            started_empty = model is empty
            parallelize(model, config, shared_mesh(config))
            assert model.lm_head.weight is model.model.embed_tokens.weight
            if started_empty:
                model.to_empty(device="cpu")
                load_whole(model, whole)
            weight = model.lm_head.weight
            assert weight is model.model.embed_tokens.weight
            assert [name for name, _ in model.named_parameters()] == names
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            model(**batch(0)).loss.backward()
            optimizer.step()
            assert model.lm_head.weight is model.model.embed_tokens.weight
            head, embedding = model.lm_head.weight.to_local(), model.model.embed_tokens.weight.to_local()
            assert head.untyped_storage().data_ptr() == embedding.untyped_storage().data_ptr()
            assert len(optimizer.state) == len(names)


@pytest.mark.parametrize("pool", ["ranks2", "ranks4"])
def test_one_tensor_and_one_optimizer_state(request: pytest.FixtureRequest, pool: str) -> None:
    request.getfixturevalue(pool).run(_one_tensor)


def _contradiction() -> None:
    from shardwright.distributed.parallelizer import fsdp2_strategy_parallelize

    model = build("llama", tie_word_embeddings=True)
    before = {name: (id(parameter), type(parameter)) for name, parameter in model.named_parameters()}
    plan = {"model.embed_tokens": "embedding_colwise", "lm_head": "colwise"}
    with pytest.raises(PlanError, match=r"embed_tokens.*lm_head.*one parameter"):
        fsdp2_strategy_parallelize(model, shared_mesh(ParallelConfig(tp=2)), tp_shard_plan=plan)
    assert {name: (id(parameter), type(parameter)) for name, parameter in model.named_parameters()} == before


def test_styles_that_contradict_a_tie_are_refused(ranks2: RankPool) -> None:
    ranks2.run(_contradiction)


class Halves(nn.Module):
    """An encoder and a decoder of the same weights; a plan names the encoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = (nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 8)}) for _ in "ab")
        for name in ("up", "down"):
            self.decoder[name].weight = self.encoder[name].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for half in (self.encoder, self.decoder):
            x = x + half["down"](half["up"](x).relu())
        return x


def test_the_other_end_of_a_tied_layer_is_cut_alike() -> None:
    styles = resolve(
        ModelReading(Halves()), ParallelPlan({"encoder.up": "colwise", "encoder.down": "rowwise"}), 2
    ).modules
    assert styles["decoder.up"].style == "colwise"
    assert styles["decoder.down"].style == "rowwise"
