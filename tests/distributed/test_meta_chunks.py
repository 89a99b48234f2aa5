"""FSDP2 of models on meta: the same shards as of models with data, without a tensor per rank and parameter."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build
from torch.distributed.tensor import DTensor

from shardwright import ParallelConfig, parallelize
from shardwright.distributed.apply.meta_chunks import MetaChunks
from shardwright.verify.ranks import RankPool


@pytest.mark.parametrize("length", [1, 3, 6, 7, 8, 9, 64])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_chunks_have_the_shapes_of_torchs(length: int, dim: int) -> None:
    shape = (length, 5) if dim == 0 else (5, length)
    x = torch.empty(shape, device="meta")
    for count in (1, 2, 3, 4, 8, 13):
        expected = torch.chunk(x, count, dim=dim)
        with MetaChunks():
            found = torch.chunk(x, count, dim=dim)
        assert [(c.shape, c.stride(), c.dtype) for c in found[: len(expected)]] == [
            (c.shape, c.stride(), c.dtype) for c in expected
        ]
        assert len(found) == count
        assert all(c.numel() == 0 for c in found[len(expected) :])


def test_thousands_of_chunks_are_few_tensors() -> None:
    with MetaChunks():
        chunks = torch.chunk(torch.empty(6656, 4, device="meta"), 2048)
    assert len(chunks) == 2048
    assert len({id(chunk) for chunk in chunks}) == 2


def test_tensors_with_data_are_chunked_by_torch() -> None:
    x = torch.arange(6)
    with MetaChunks():
        chunks = torch.chunk(x, 4)
    assert [chunk.tolist() for chunk in chunks] == [[0, 1], [2, 3], [4, 5]]


def _shards() -> None:
    """On four ranks: 99 rows, heads of 2 and vectors leave some ranks less than others, or nothing."""
    config = ParallelConfig(tp=1, dp_shard=4)
    real = parallelize(build("qwen3", head_dim=3), config)
    with torch.device("meta"):
        empty = parallelize(type(real)(real.config), config)
    others = dict(empty.named_parameters())
    for name, parameter in real.named_parameters():
        other = others[name]
        assert isinstance(parameter, DTensor)
        assert isinstance(other, DTensor)
        assert other.is_meta, name
        assert other.to_local().shape == parameter.to_local().shape, name
        assert (other.shape, other.placements) == (parameter.shape, parameter.placements), name


def test_shards_of_a_model_on_meta_are_those_of_a_model_with_data(ranks4: RankPool) -> None:
    ranks4.run(_shards)
