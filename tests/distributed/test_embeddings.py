"""Embeddings that are cut: those whose class does more than look ids up, and those beside the input embedding."""

from __future__ import annotations

import pytest
import torch
from steps import assert_same_step
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn import functional

from shardwright import ParallelConfig
from shardwright.distributed.parallelizer import fsdp2_strategy_parallelize
from shardwright.distributed.planning.sources import choose_plan
from shardwright.distributed.planning.tensor import plan_and_resolve
from shardwright.distributed.replay.reading import ModelReading
from shardwright.distributed.styles import make_style
from shardwright.errors import PlanError
from shardwright.verify.public import case_of
from shardwright.verify.ranks import RankPool, shared_mesh
from shardwright.verify.run import run_case

VOCABULARY, WIDTH, SPECIAL = 11, 8, 7


class SpecialToken(nn.Embedding):
    """Scales its vectors, and has one token's vector in a parameter of its own (as T5Gemma 2 has)."""

    def __init__(self) -> None:
        super().__init__(VOCABULARY, WIDTH, padding_idx=3)
        self.special = nn.Parameter(torch.randn(WIDTH))

    def forward(self, input_ids: Tensor) -> Tensor:
        vectors = super().forward(input_ids) * 3
        vectors[input_ids == SPECIAL] = self.special
        return vectors


class FromShape(nn.Embedding):
    """Positions, from the shape of the ids (as LED has)."""

    def __init__(self) -> None:
        super().__init__(VOCABULARY, WIDTH)

    def forward(self, shape: torch.Size) -> Tensor:
        return super().forward(torch.arange(shape[-1]) + 1)


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = SpecialToken(), FromShape()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids: Tensor) -> Tensor:
        stream = self.mix(self.words(input_ids) + self.positions(input_ids.shape))
        return functional.mse_loss(stream, torch.linspace(0, 1, WIDTH).expand_as(stream))


def _reader() -> nn.Module:
    torch.manual_seed(5)
    return Reader()


def _ids(index: int) -> Tensor:
    return torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(index)).index_fill(
        1, torch.tensor([2]), SPECIAL
    )


def _classes(config: ParallelConfig) -> None:
    styles = {"words": "embedding_rowwise", "positions": "embedding_rowwise", "mix": "colwise_gather_output"}
    model = fsdp2_strategy_parallelize(
        _reader(),
        shared_mesh(config),
        MixedPrecisionPolicy(),
        tp_shard_plan=styles,  # type: ignore[arg-type]
    )
    assert model.get_parameter("words.weight").to_local().shape[0] < VOCABULARY
    # Every data-parallel rank has the same ids, so that their mean is what one process has.
    assert_same_step(model, _reader(), lambda each: each(_ids(1)), f"{config}")


@pytest.mark.parametrize("config", [ParallelConfig(tp=2), ParallelConfig(tp=2, dp_shard=2)])
def test_classes_that_do_more(request: pytest.FixtureRequest, config: ParallelConfig) -> None:
    request.getfixturevalue("ranks2" if config.dp_shard < 2 else "ranks4").run(_classes, config)


@pytest.mark.parametrize("style", ["embedding_rowwise", "embedding_colwise"])
@pytest.mark.parametrize("option", ["scale_grad_by_freq", "sparse", "max_norm"])
def test_what_a_cut_table_cannot_do_is_refused(style: str, option: str) -> None:
    table = nn.Embedding(8, 4, **{option: True})
    with pytest.raises(PlanError, match=r"words.*'replicate'"):
        make_style(style).check(table, "words", 2)


@pytest.mark.parametrize("sequence_parallel", [pytest.param(False, marks=pytest.mark.sweep), True])
def test_a_table_for_every_layer_is_cut_too(ranks4: RankPool, sequence_parallel: bool) -> None:
    config = ParallelConfig(tp=2, dp_shard=2, sequence_parallel=sequence_parallel)
    case = case_of("gemma3n_text", config)
    _, resolved = plan_and_resolve(ModelReading(case.build()), None, 2)
    assert resolved.modules["model.embed_tokens_per_layer"].style == "embedding_colwise"
    report = ranks4.run(run_case, case)[0]
    assert report.exact, report


def test_tables_that_are_small_or_tied_stay_whole() -> None:
    model = case_of("gemma3n_text", ParallelConfig(tp=2)).build()
    model.model.embed_tokens_per_layer = nn.Embedding(8, 4)
    assert "model.embed_tokens_per_layer" not in choose_plan(ModelReading(model)).styles
    model.model.embed_tokens_per_layer = nn.Embedding(*model.model.embed_tokens.weight.shape)
    assert choose_plan(ModelReading(model)).styles["model.embed_tokens_per_layer"] == "embedding_colwise"
    model.model.embed_tokens_per_layer.weight = model.lm_head.weight
    assert "model.embed_tokens_per_layer" not in choose_plan(ModelReading(model)).styles
