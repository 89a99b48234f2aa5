"""The pool of ranks: values come back by rank, failures come back as what they were, and the pool survives them."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from shardwright.distributed.config import ParallelConfig
from shardwright.errors import PlanError
from shardwright.verify.ranks import RankError, RankPool, shared_mesh


def total(scale: int) -> tuple[int, float]:
    value = torch.tensor(float(scale * (dist.get_rank() + 1)))
    dist.all_reduce(value)
    return dist.get_rank(), value.item()


def refuse() -> None:
    raise PlanError("does not fit")


def fail_alone(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError("only me")
    dist.barrier()


class StrangeError(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def fail_strangely() -> None:
    raise StrangeError(1, 2)


def return_lambda() -> object:
    return lambda: None


def die(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()


def sleep_alone(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(60)


def pid() -> int:
    return os.getpid()


def mesh_ids() -> list[int]:
    configs = [ParallelConfig(tp=2), ParallelConfig(tp=2, sequence_parallel=True), ParallelConfig(dp_shard=2)]
    return [id(shared_mesh(config)) for config in configs]


def test_every_rank_answers_in_order(ranks2: RankPool) -> None:
    assert ranks2.run(total, 10) == [(0, 30.0), (1, 30.0)]


def test_tensors_come_back(ranks2: RankPool) -> None:
    first, second = ranks2.run(torch.arange, 3)
    assert torch.equal(first, second)


def test_an_error_keeps_its_type_and_the_ranks_live_on(ranks2: RankPool) -> None:
    before = ranks2.run(pid)
    with pytest.raises(PlanError, match="does not fit") as caught:
        ranks2.run(refuse)
    assert "On rank 0" in caught.value.__notes__[0]
    assert "in refuse" in caught.value.__notes__[0]
    assert ranks2.run(pid) == before


def test_an_error_on_one_rank_does_not_hang_the_others(ranks2: RankPool) -> None:
    with pytest.raises(KeyError, match="only me"):
        ranks2.run(fail_alone, 1)
    assert ranks2.run(total, 1) == [(0, 3.0), (1, 3.0)]


def test_what_cannot_be_pickled_is_still_reported(ranks2: RankPool) -> None:
    with pytest.raises(RankError, match="StrangeError: 1 and 2"):
        ranks2.run(fail_strangely)
    with pytest.raises((AttributeError, RankError), match="return_lambda"):
        ranks2.run(return_lambda)


def test_a_dead_rank_is_an_error_and_the_pool_starts_anew(ranks2: RankPool) -> None:
    with pytest.raises(RankError, match=r"Rank 1 of 2 died \(exit code 7\)"):
        ranks2.run(die, 1)
    assert ranks2.run(total, 1) == [(0, 3.0), (1, 3.0)]


def test_a_slow_rank_is_an_error_that_says_where_it_was(ranks2: RankPool) -> None:
    with pytest.raises(RankError, match=r"Rank\(s\) \[1\] of 2 did not answer within 1 second") as caught:
        ranks2.run(sleep_alone, 1, timeout=1)
    assert "sleep_alone" in caught.value.__notes__[0]
    assert ranks2.run(total, 1) == [(0, 3.0), (1, 3.0)]


def test_meshes_are_shared_by_degrees(ranks2: RankPool) -> None:
    for tp, with_sequence, dp in ranks2.run(mesh_ids):
        assert tp == with_sequence != dp


def make_groups(number: int) -> int:
    for _ in range(number):
        dist.new_group()
    return os.getpid()


def test_ranks_that_hold_many_groups_are_replaced() -> None:
    with RankPool(2) as pool:
        first = pool.run(make_groups, 10)
        assert pool.run(make_groups, 10) == first
        third = pool.run(total, 1), pool.run(pid)
    assert third[0] == [(0, 3.0), (1, 3.0)]
    assert not set(third[1]) & set(first)


def test_no_rank_outlives_its_pool() -> None:
    with RankPool(2) as pool:
        pids = pool.run(pid)
    for number in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)
