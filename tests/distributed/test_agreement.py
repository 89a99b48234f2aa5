"""What the ranks' models are compared by: every bit of every tensor, where it stands."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from tiny_models import build
from torch import Tensor

from shardwright import ParallelConfig, parallelize
from shardwright.distributed.apply.guards.agreement import _checksum, _multipliers
from shardwright.errors import PlanError
from shardwright.verify.ranks import RankPool, shared_mesh

PLANTED = {
    "model.layers.1.mlp.up_proj.weight": "two rows of a weight have changed places",
    "shift": "a buffer differs that checkpoints have",
    "model.rotary_emb.inv_freq": "a buffer differs that no checkpoint has",
}


def _different(name: str) -> str:
    model = build("llama")
    model.register_buffer("shift", torch.arange(4))
    if dist.get_rank() == 1:
        tensor = {**dict(model.named_parameters()), **dict(model.named_buffers())}[name]
        with torch.no_grad():
            tensor[:2] = tensor[:2].flip(0).clone()
    with pytest.raises(PlanError, match="do not hold the same model") as caught:
        parallelize(model, ParallelConfig(dp_shard=2), shared_mesh(ParallelConfig(dp_shard=2)))
    return str(caught.value)


@pytest.mark.parametrize("name", list(PLANTED), ids=list(PLANTED.values()))
def test_a_planted_difference_is_named(ranks2: RankPool, name: str) -> None:
    first, second = ranks2.run(_different, name)
    assert first == second
    assert f"{name} is" in first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.complex64])
def test_the_checksum_sees_bits_and_places(dtype: torch.dtype) -> None:
    def checksum(x: Tensor) -> str:
        return _checksum(x.to(dtype), multipliers)

    multipliers = _multipliers(torch.device("cpu"))
    x = torch.zeros(600, 1000)  # more than two chunks
    x[0, 0] = x[599, 999] = 1.0
    swapped, moved = x.clone(), x.roll(1)
    swapped[0, 0], swapped[300, 0] = x[300, 0], x[0, 0]
    assert len({checksum(x), checksum(swapped), checksum(moved), checksum(torch.zeros(600, 1000))}) == 4
    assert checksum(x) == checksum(x.T.contiguous().T)  # only the values count, not how they lie in memory


def test_nan_and_nothing_have_checksums() -> None:
    multipliers = _multipliers(torch.device("cpu"))
    values = [torch.tensor(float("nan")), torch.zeros(()), torch.zeros(0, 3), -torch.zeros(1)]
    assert len({_checksum(value, multipliers) for value in values}) == 3  # a zero, and no values at all, are alike
