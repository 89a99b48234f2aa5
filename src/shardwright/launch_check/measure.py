"""The measurements of a check: every rank of the mesh makes the same ones, at the same time."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from shardwright.launch_check.facts import Measured

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
    return min(_times(lambda: x @ x, device, _WORKS))


def all_reduces(axis: DeviceMesh, device: torch.device) -> Measured:
    """Medians along ``axis``; the larger size is the largest that does not take long."""
    group = axis.get_group()
    small = torch.zeros(1, device=device)
    latency = median(_times(lambda: dist.all_reduce(small, group=group), device, _SMALL))
    seconds, size = 0.0, 0
    for size in _SIZES[device.type]:
        large = torch.zeros(size // 4, device=device)
        seconds = median(_times(lambda x=large: dist.all_reduce(x, group=group), device, _LARGE))  # type: ignore[misc]
        slowest = torch.tensor(seconds, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)  # of all ranks, so that they stop together
        if slowest.item() > _LONG:
            break
    return Measured(latency, seconds, size)


def _times(call: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each call to its end on the device, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        _synchronize(device)
        start = time.perf_counter()
        call()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return times[1:]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
