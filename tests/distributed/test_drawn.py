"""Random numbers for parameters and gradients, from outside of the model: those of one process, on every replica."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tiny_models import build
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardwright import ParallelConfig, parallelize
from shardwright.errors import UnsupportedError
from shardwright.verify.ranks import RankPool, shared_mesh
from shardwright.verify.step import full

FSDP = ParallelConfig(dp_shard=2)
OF_TWO = (FSDP, ParallelConfig(tp=2), ParallelConfig(dp_replicate=2))
OF_FOUR = (FSDP.with_(tp=2, sequence_parallel=True), FSDP.with_(dp_replicate=2))
DRAWN: dict[str, Callable[[Any], Any]] = {
    "set anew": nn.init.normal_,
    "set anew by its sizes": lambda p: nn.init.xavier_uniform_(p) if p.ndim > 1 else nn.init.uniform_(p),
    "cut off, near the mean and far from it": lambda p: nn.init.trunc_normal_(p, a=-2.0 if p.ndim > 1 else 1.5, b=2.5),
    "uniform": lambda p: p.uniform_(-1, 1),
    "noise": lambda p: p.add_(torch.randn_like(p), alpha=0.1),
    "a mask": lambda p: p.mul_(torch.empty_like(p).bernoulli_(0.5)),
    "a mask of booleans": lambda p: p.masked_fill_(torch.rand_like(p) < 0.5, 0.0),
    "dropout": lambda p: p.copy_(F.dropout(p, 0.5)),
    "dropout in place": lambda p: F.dropout(p, 0.5, inplace=True),
    "dropout in evaluation mode": lambda p: p.copy_(F.dropout(p, 0.5, training=False)),
    "as likely as another says": lambda p: p.bernoulli_(p.clone().sigmoid()),
    "noise in the gradient": lambda p: p.grad.add_(torch.randn_like(p.grad)),
    "noise of data": lambda p: p.data.add_(torch.rand_like(p.data)),
}


def _drawn(configs: tuple[ParallelConfig, ...]) -> None:
    for config in configs:
        model, reference = parallelize(build("phi3"), config, shared_mesh(config)), build("phi3")
        ids = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(0))
        for each in (model, reference):
            each(input_ids=ids, labels=ids).loss.backward()
        for what, draw in DRAWN.items():
            torch.manual_seed(dist.get_rank())
            with torch.no_grad():
                for parameter in model.parameters():
                    draw(parameter)
            torch.manual_seed(0)  # the first rank's
            with torch.no_grad():
                for parameter in reference.parameters():
                    draw(parameter)
            for (name, here), there in zip(model.named_parameters(), reference.parameters(), strict=True):
                _assert_same(here, there, f"{what}: {name}, {config}")
                _assert_same(here.grad, there.grad, f"{what}: gradient of {name}, {config}")


def _assert_same(here: Tensor, there: Tensor, what: str) -> None:
    """On every rank: the whole tensor is made from the shards of one of the replicas alone."""
    torch.testing.assert_close(full(here), there, rtol=1e-5, atol=1e-6, msg=lambda text: f"{what}: {text}")
    assert isinstance(here, DTensor)
    local = here.to_local().detach().clone()
    for axis, placement in enumerate(here.placements):
        if placement.is_replicate():
            first = local.clone()
            dist.broadcast(first, group=here.device_mesh.get_group(axis), group_src=0)
            assert torch.equal(local, first), what


@pytest.mark.parametrize("pool", ["ranks2", pytest.param("ranks4", marks=pytest.mark.sweep)])
def test_drawn_as_in_one_process(pool: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(pool).run(_drawn, OF_TWO if pool == "ranks2" else OF_FOUR)


def _refused() -> list[str]:
    model = parallelize(build("llama"), FSDP, shared_mesh(FSDP))
    weight, told = model.lm_head.weight, []
    before = full(weight)
    for draw in (lambda: weight.data.normal_(generator=torch.Generator()), lambda: F.dropout(weight, 0.5)):
        try:
            draw()
        except UnsupportedError as error:
            told.append(str(error))
    assert torch.equal(full(weight), before)
    assert torch.equal(full(F.dropout(weight, 0.5, training=False)), before), "nothing is drawn"
    return told


def test_what_ranks_would_draw_apart_is_refused(ranks2: RankPool) -> None:
    (generator, graph), other = ranks2.run(_refused)
    assert (generator, graph) == tuple(other)
    assert "normal_ with a generator" in generator
    assert "dropout draws for a sharded parameter where gradients are recorded" in graph
