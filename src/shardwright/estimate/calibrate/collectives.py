"""How fast ranks talk to each other: latency and bandwidth of gathers and reductions, in a ring."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from shardwright.timing import timed

KINDS = ("all_gather", "reduce_scatter", "all_reduce")
SMALL = 2**12  # bytes of the whole tensor: latency
LARGE = {"cuda": 2**28, "cpu": 2**24}
_REPEATS = 7
_RESULT = "link.json"


@dataclass(frozen=True)
class Link:
    """What a group of ranks reached.

    Attributes:
        ranks: how many there are.
        latency_us: of one step of a ring.
        gb_per_s: of one rank, in one direction.
        seconds: kind of collective -> that of a large tensor.
    """

    ranks: int
    latency_us: float
    gb_per_s: float
    seconds: dict[str, float]


def measure_group(device: torch.device, group: dist.ProcessGroup | None = None) -> Link:
    """Time collectives on this rank; every rank of ``group`` calls this, and gets the slowest rank's times.

    A gather of ``size`` bytes among ``n`` ranks takes ``(n - 1) * (latency + size / n / bandwidth)``, an all-reduce
    twice that. Latency comes from a tensor of 4 KiB, bandwidth from a large one: the mean of the three kinds.
    """
    ranks = dist.get_world_size(group)
    small = {kind: _timed(kind, SMALL, device, group) for kind in KINDS}
    large = {kind: _timed(kind, LARGE[device.type], device, group) for kind in KINDS}
    rounds = {kind: 2 if kind == "all_reduce" else 1 for kind in KINDS}
    latency = sum(small[kind] / rounds[kind] / (ranks - 1) for kind in KINDS) / len(KINDS)
    sent = LARGE[device.type] * (ranks - 1) / ranks
    speeds = [
        sent / max(large[kind] / rounds[kind] - (ranks - 1) * latency, 0.1 * large[kind] / rounds[kind])
        for kind in KINDS
    ]
    return Link(ranks, latency * 1e6, sum(speeds) / len(speeds) / 1e9, large)


def _timed(kind: str, size: int, device: torch.device, group: dist.ProcessGroup | None) -> float:
    """Seconds of a collective of ``size`` bytes in all, on the slowest rank."""
    ranks = dist.get_world_size(group)
    whole = torch.zeros(size // 4 // ranks * ranks, device=device)
    part = torch.zeros(whole.numel() // ranks, device=device)
    run: dict[str, Callable[[], object]] = {
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole, group=group),
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
    }
    times = timed(run[kind], device, _REPEATS, uncounted=2, before=lambda: dist.barrier(group=group))
    slowest = torch.tensor(median(times), device=device, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
    return float(slowest)


def measure_local_ranks(ranks: int, device_type: str) -> Link:
    """The same among ``ranks`` processes that are started here, and ended again."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (ranks, device_type, folder), nprocs=ranks)
        return Link(**json.loads((Path(folder) / _RESULT).read_text()))


def _rank(rank: int, ranks: int, device_type: str, folder: str) -> None:
    device = torch.device("cuda", rank) if device_type == "cuda" else torch.device("cpu")
    if device_type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // ranks, 1))
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    try:
        link = measure_group(device)
        if rank == 0:
            (Path(folder) / _RESULT).write_text(json.dumps(asdict(link)))
    finally:
        dist.destroy_process_group()
