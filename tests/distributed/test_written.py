"""Parameters that are written to by hand: as in one process, or refused; never lost in a copy."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import build
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardwright import ParallelConfig, parallelize
from shardwright.errors import UnsupportedError
from shardwright.verify.ranks import RankPool, shared_mesh
from shardwright.verify.step import full

FSDP = ParallelConfig(dp_shard=2)
OF_TWO = (FSDP, ParallelConfig(tp=2), ParallelConfig(dp_replicate=2))
OF_FOUR = (FSDP.with_(tp=2, sequence_parallel=True), FSDP.with_(dp_replicate=2), ParallelConfig(tp=2, dp_replicate=2))


def _add_to_a_row(w: Tensor) -> None:
    w[3] = w[3] + 1


def _mean_row(w: Tensor) -> None:
    w[-3:] = w.mean(0)


def _values(w: Tensor) -> Tensor:
    return torch.arange(float(w.numel())).view(w.shape)


RIGHT: dict[str, Callable[[Any], Any]] = {
    "a row": lambda w: w.__setitem__(0, 0.5),
    "rows, from the weight": _mean_row,
    "rows, from a plain tensor": lambda w: w.__setitem__(slice(1, 4), torch.ones(w.shape[1:])),
    "added to": _add_to_a_row,
    "through data": lambda w: w.data.__setitem__((5, slice(1, 3)), 1.0),
    "where a mask is": lambda w: w.__setitem__(w > 0, 0.0),
    "by index": lambda w: w.__setitem__(torch.tensor([1, 2]), 0.0),
    "filled by index": lambda w: w.index_fill_(0, torch.tensor([1, 2]), 0.0),
    "all of it": lambda w: w.copy_(_values(w)),
    "one by one": lambda w: w.mul_(_values(w)),
    "data replaced": lambda w: setattr(w, "data", _values(w)),
    "data computed": lambda w: setattr(w, "data", w.data * 2 + w.detach().mean(0)),
    "masked": lambda w: w.masked_fill_(w > 0, 0.0),
    "initialised": nn.init.ones_,
}
RIGHT_OR_REFUSED: dict[str, Callable[[Any], Any]] = {
    "a row": lambda w: w[0].zero_(),
    "a row of data": lambda w: w.data[0].fill_(2.0),
    "a row, detached": lambda w: w[0].detach().zero_(),
    "selected": lambda w: w.select(0, 3).fill_(1.0),
    "rows": lambda w: w.narrow(0, 20, 4).copy_(torch.zeros(4, w.shape[1])),
    "a column": lambda w: w[:, 3].fill_(1.0),
    "transposed": lambda w: w.t().mul_(2.0),
    "a row of the transposed": lambda w: w.T[3].zero_(),
    "data of another dtype": lambda w: setattr(w, "data", w.data.double()),
    "flat": lambda w: w.view(-1)[:40].zero_(),
    "in pieces": lambda w: [piece.fill_(n) for n, piece in enumerate(w.split(8))],
    "a part of a part": lambda w: w[4:9][1:3].zero_(),
}


def _written(configs: tuple[ParallelConfig, ...]) -> int:
    refused = 0
    for config in configs:
        model, reference = parallelize(build("phi3"), config, shared_mesh(config)), build("phi3")
        layer, names = "model.layers.0.mlp", ("gate_up_proj.weight", "down_proj.weight")
        for name in (*(f"{layer}.{each}" for each in names), "lm_head.weight", "model.embed_tokens.weight"):
            here, there = model.get_parameter(name), reference.get_parameter(name)
            assert isinstance(here, DTensor)
            for what, write in (RIGHT | {f"{key}, by a view": each for key, each in RIGHT_OR_REFUSED.items()}).items():
                with torch.no_grad():
                    here.copy_(full(here) * 0 + _values(there))
                    there.copy_(_values(there))
                    try:
                        write(here)
                    except UnsupportedError as error:
                        if what in RIGHT or not re.search(
                            r"weight\[rows\] = values|cannot compute view|cannot become another", str(error)
                        ):
                            raise
                        refused += 1
                    else:
                        write(there)
                assert torch.equal(full(here), there), f"{what}: {name}, {config}"
    return refused


@pytest.mark.parametrize("pool", ["ranks2", pytest.param("ranks4", marks=pytest.mark.sweep)])
def test_written_by_hand(pool: str, request: pytest.FixtureRequest) -> None:
    refused = request.getfixturevalue(pool).run(_written, OF_TWO if pool == "ranks2" else OF_FOUR)
    assert len(set(refused)) == 1, "the same on every rank"
    assert refused[0] > 20


def _from_different_seeds() -> Tensor:
    config = ParallelConfig(dp_replicate=2)
    model = parallelize(build("llama"), config, shared_mesh(config))
    torch.manual_seed(torch.distributed.get_rank())
    weight = model.model.norm.weight
    with torch.no_grad():
        weight[:4] = torch.randn(4)
    return weight.to_local().detach().clone()


def test_replicas_stay_one_model(ranks2: RankPool) -> None:
    one, other = ranks2.run(_from_different_seeds)
    assert torch.equal(one, other)
