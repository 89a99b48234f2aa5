"""Predicted bytes are those of real ranks after a real step."""

from __future__ import annotations

import pytest
import torch
from estimate_models import FAMILIES, config_of, real_memory
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.placement_types import Shard, _StridedShard

from shardwright import ParallelConfig
from shardwright.distributed.planning.layout import ParameterLayout
from shardwright.errors import PlanError
from shardwright.estimate import predict
from shardwright.verify.ranks import RankPool


def check(family: str, config: ParallelConfig, pool: RankPool) -> None:
    real = pool.run(real_memory, family, config)
    memory = predict(config_of(family), config).memory
    assert (memory.parameters, memory.gradients, memory.optimizer) == real[0]
    assert memory.total == max(map(sum, real))


@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_parallel(family: str, ranks2: RankPool) -> None:
    check(family, ParallelConfig(tp=2, dp_shard=1), ranks2)


@pytest.mark.parametrize("family", ["qwen3 tied", "phi3", "mixtral"])
def test_with_fsdp(family: str, ranks4: RankPool) -> None:
    check(family, ParallelConfig(tp=2, dp_shard=2), ranks4)


def test_fsdp_alone(ranks2: RankPool) -> None:
    check("qwen3 tied", ParallelConfig(tp=1, dp_shard=2), ranks2)


def layout(shape: tuple[int, ...], placement: object) -> ParameterLayout:
    return ParameterLayout("m", "weight", shape, torch.float32, placement, 4, True)  # type: ignore[arg-type]


def test_uneven_parts_count_the_largest() -> None:
    assert layout((97, 8), Shard(0)).local_shape(3) == (9, 8)
    assert layout((8, 97), Shard(1)).local_shape(3) == (3, 25)
    assert layout((2, 8), Replicate()).local_shape(3) == (1, 8)


def test_packed_weights_are_cut_along_the_other_dim_by_fsdp() -> None:
    packed = layout((96, 32), _StridedShard(0, split_factor=2))
    assert packed.local_shape(4) == (24, 8)
    with pytest.raises(PlanError, match=r"m.weight is packed .* 3 data-parallel"):
        packed.local_shape(3)


def test_weights_in_bfloat16_take_half() -> None:
    full, half = (
        predict(config_of("llama"), ParallelConfig(tp=2), weights=dtype).memory for dtype in ("float32", "bfloat16")
    )
    assert half.total * 2 == full.total
