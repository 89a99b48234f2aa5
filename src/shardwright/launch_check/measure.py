"""The measurements of a check: every rank of the mesh makes the same ones, at the same time."""

from __future__ import annotations

import time
from statistics import median

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from shardwright.launch_check.facts import Measured
from shardwright.timing import timed

_MIB = 2**20
_SIZES = {"cpu": (_MIB, 16 * _MIB), "cuda": (_MIB, 16 * _MIB, 256 * _MIB)}
_LONG = 0.2  # seconds of one all-reduce, from which on no larger one is tried
_WIDTH = {"cpu": 384, "cuda": 4096}  # of the matrices that are multiplied
_CLOCKS, _WORKS, _SMALL, _LARGE = 5, 7, 30, 5  # how often each is done


def seconds_ahead() -> float:
    """How far this rank's clock is ahead of rank 0's; as exact as the ranks leave a barrier together."""
    mine = []
    for _ in range(_CLOCKS):
        dist.barrier()
        mine.append(time.time())
    everyone: list[list[float]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    return median(own - first for own, first in zip(mine, everyone[0], strict=True))


def work(device: torch.device) -> float:
    """Seconds of a product of matrices: the least of several, which other programs disturb least."""
    width = _WIDTH[device.type]
    x = torch.ones(width, width, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, device=device)
    return min(timed(lambda: x @ x, device, _WORKS))


def all_reduces(axis: DeviceMesh, device: torch.device) -> Measured:
    """Medians along ``axis``; the larger size is the largest that does not take long."""
    group = axis.get_group()
    small = torch.zeros(1, device=device)
    latency = median(timed(lambda: dist.all_reduce(small, group=group), device, _SMALL))
    seconds, size = 0.0, 0
    for size in _SIZES[device.type]:
        large = torch.zeros(size // 4, device=device)
        seconds = median(timed(lambda x=large: dist.all_reduce(x, group=group), device, _LARGE))  # type: ignore[misc]
        slowest = torch.tensor(seconds, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)  # of all ranks, so that they stop together
        if slowest.item() > _LONG:
            break
    return Measured(latency, seconds, size)
