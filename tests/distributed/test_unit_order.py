"""Data-parallel ranks that run FSDP2's units again, in other orders, or leave a loop sooner than others."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from steps import assert_same, assert_same_gradients, assert_same_parameters
from torch import Tensor, nn

from shardwright import ParallelConfig, parallelize
from shardwright.errors import PlanError
from shardwright.verify.ranks import RankError, RankPool, shared_mesh

FSDP = ParallelConfig(dp_shard=2)


class Routed(nn.Module):
    """A model whose layers run in the order that it is called with, behind some that it leaves early."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.first = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))
        self.head = nn.Linear(8, 8)

    def forward(self, ids: Tensor, layers: Sequence[int] = (0, 1, 2), exit_after: int = 2) -> Tensor:
        x = self.embed(ids)
        for number, layer in enumerate(self.first):
            if number < exit_after:
                x = x + layer(x)
        for number in layers:
            x = x + self.layers[number](x)
        return self.head(x).square().mean()


def _loss(index: int, layers: Sequence[int], exit_after: int, model: nn.Module) -> Tensor:
    ids = torch.randint(16, (2, 6), generator=torch.Generator().manual_seed(index))
    loss: Tensor = model(ids, layers, exit_after)
    return loss


TOGETHER = (0, 1, 2, 0, 1, 2, 2, 1, 0)
EXACT = (  # what the two ranks run, from step to step: layers, and after how many of the first tower they leave it
    (((0, 1, 2), 1), ((0, 1), 2)),  # early exits
    (((0,), 0), ((), 2)),
    ((TOGETHER, 2), (TOGETHER, 1)),  # the same turns on both, in orders of any kind
    (((0, 1, 2), 2), ((0, 1, 2, 0, 1, 2), 2)),  # another number of turns, below what both have taken
    (((2, 1, 0), 2), ((0, 1, 2), 0)),  # another order, which is a part of what both have run
    (((), 2), ((2, 2, 0), 1)),
    (((1, 0), 2), ((0, 2, 1, 2), 1)),
)


def _exact(configs: Sequence[ParallelConfig]) -> None:
    for config in configs:
        torch.manual_seed(0)
        whole = Routed()
        model = parallelize(copy.deepcopy(whole), config, shared_mesh(config))
        optimizers = [torch.optim.AdamW(each.parameters(), lr=0.01, eps=1e-2) for each in (model, whole)]
        for number, ways in enumerate(EXACT):
            losses = [partial(_loss, 2 * number + rank, *way) for rank, way in enumerate(ways)]
            own = losses[dist.get_rank()]
            with torch.no_grad():
                assert_same(own(model), own(whole), f"{config}: evaluation {number}")
            loss = own(model)
            assert_same(loss, own(whole), f"{config}: loss {number}")
            loss.backward()
            for each in losses:
                (each(whole) / 2).backward()
            assert_same_gradients(model, whole, f"{config}: step {number}")
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            assert_same_parameters(model, whole, f"{config}: after step {number}")


def test_what_all_ranks_have_run_may_be_left_out(ranks2: RankPool) -> None:
    settings = (FSDP, FSDP.with_(reshard_after_forward="always", activation_checkpointing="full"))
    ranks2.run(_exact, (*settings, FSDP.with_(reshard_after_forward="never", prefetch=2)))


APART = {  # what the two ranks run, and what the error names
    "another order": (((0, 1, 2), (2, 1, 0)), ("rank 1 runs 'layers.1' once more or out of turn", "rank 0 has")),
    "other turns": (((0, 0, 1), (0, 1, 1)), ("rank 0 runs 'layers.0'", "rank 1 has gone on to 'layers.1'")),
}


def _apart(ways: Sequence[Sequence[int]], folder: Path) -> None:
    """Writes its error to a file and ends, as the rank of a script would."""
    torch.manual_seed(0)
    model = parallelize(Routed(), FSDP, shared_mesh(FSDP))
    rank = dist.get_rank()
    for number in range(2):
        _loss(number, (0, 1, 2), 2, model).backward()
    begun = time.monotonic()
    try:
        _loss(rank, ways[rank], 2, model).backward()
    except PlanError as error:
        (folder / f"{rank}").write_text(f"{time.monotonic() - begun:.0f} s: {error}")
    finally:
        os._exit(1)


@pytest.mark.parametrize("kind", list(APART))
def test_an_error_on_every_rank(tmp_path: Path, kind: str) -> None:
    ways, names = APART[kind]
    with RankPool(2, timeout=120) as pool, pytest.raises(RankError):
        pool.run(_apart, ways, tmp_path)
    found = {path.name: path.read_text().split(" s: ", 1) for path in tmp_path.iterdir()}
    assert sorted(found) == ["0", "1"]
    (waited, error), (_, other) = found.values()
    assert error == other
    assert int(waited) < 30, "it waited for a time limit"
    for name in (*names, "in forward 3"):
        assert name in error, error
