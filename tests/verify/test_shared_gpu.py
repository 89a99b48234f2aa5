"""The backend of ranks that share a GPU does what gloo does; on the CPU, which it takes too."""

from __future__ import annotations

from functools import cache
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

from shardwright import ParallelConfig
from shardwright.errors import ConfigError
from shardwright.verify import shared_gpu, verify
from shardwright.verify.ranks import RankPool

KINDS = ("all_reduce", "all_gather", "gather_list", "reduce_scatter", "all_to_all", "broadcast", "objects", "barrier")


@cache
def _group() -> dist.ProcessGroup:
    shared_gpu.register()
    return dist.new_group(backend=shared_gpu.BACKEND)


def _collective(kind: str, x: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Its results, by torch's function and by the functional one."""
    ranks = group.size()
    out = {"all_gather": x.new_empty(ranks * len(x)), "reduce_scatter": x.new_empty(len(x) // ranks)}.get(kind, x + 1)
    if kind == "all_reduce":
        dist.all_reduce(out, dist.ReduceOp.MAX, group=group)
        return [out, functional.all_reduce(x, "avg", group), *functional.all_reduce_coalesced([x, x], "sum", group)]
    if kind == "all_gather":
        dist.all_gather_into_tensor(out, x, group=group)
        return [out, functional.all_gather_tensor(x, 0, group)]
    if kind == "gather_list":
        parts = [torch.empty_like(x) for _ in range(ranks)]
        dist.all_gather(parts, x, group=group)
        return parts
    if kind == "reduce_scatter":
        dist.reduce_scatter_tensor(out, x, dist.ReduceOp.AVG, group=group)
        return [out, functional.reduce_scatter_tensor(x, "sum", 0, group)]
    if kind == "all_to_all":
        dist.all_to_all_single(out, x, group=group)
        return [out, functional.all_to_all_single(x, None, None, group)]
    if kind == "broadcast":
        dist.broadcast(out, 1, group=group)
        return [out, functional.broadcast(x, 1, group)]
    if kind == "objects":
        found: list[Tensor] = [x] * ranks
        dist.all_gather_object(found, x, group=group)
        return found
    dist.barrier(group=group)
    return [x]


def _same(kind: str) -> None:
    x = torch.arange(8.0).view(4, 2).t().flatten() + 10 * dist.get_rank()
    expected = _collective(kind, x.clone(), dist.group.WORLD)
    with patch.object(shared_gpu, "_on_host", lambda tensors: [tensor.detach().clone() for tensor in tensors]):
        found = _collective(kind, x.clone(), _group())  # on a GPU, what is on the host is a copy
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(mine), torch.as_tensor(theirs), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_as_gloo(ranks2: RankPool, kind: str) -> None:
    ranks2.run(_same, kind)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    with pytest.raises(ConfigError, match="no GPU"):
        verify("llama", ParallelConfig(tp=2), device="cuda")
