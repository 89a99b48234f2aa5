"""What one rank says of itself, as plain data that it sends to the others."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import shardwright
from shardwright.distributed.axes import EXPERTS, NAMES
from shardwright.distributed.mesh import axis

_SETTINGS = (
    "NCCL_",
    "TORCH_NCCL_",
    "GLOO_",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUDA_LAUNCH_BLOCKING",
    "TORCH_DISTRIBUTED_DEBUG",
)


@dataclass(frozen=True)
class Measured:
    """All-reduces of one rank along one axis.

    Attributes:
        latency: seconds of one of 4 bytes.
        seconds: of one of ``size`` bytes.
        size: bytes.
    """

    latency: float
    seconds: float
    size: int


@dataclass(frozen=True)
class RankFacts:
    """One rank.

    Attributes:
        device: in words.
        kind: of the device, as torch calls it.
        versions: name -> version of everything that has to be the same on all ranks.
        coordinates: axis with more than one rank -> place along it.
        groups: the same axes -> the ranks of this rank's group.
        settings: environment variables that NCCL, gloo and CUDA read.
        came: seconds since 1970 when it began to look for the others, by its own clock.
        ahead: seconds that its clock is ahead of rank 0's.
        work: seconds of a product of matrices, the same on every rank.
        measured: axis -> its all-reduces.
    """

    rank: int
    host: str
    device: str
    kind: str
    versions: Mapping[str, str]
    coordinates: Mapping[str, int]
    groups: Mapping[str, tuple[int, ...]]
    settings: Mapping[str, str]
    came: float
    ahead: float
    work: float
    measured: Mapping[str, Measured]


def axes_of(mesh: DeviceMesh, experts: int) -> dict[str, DeviceMesh]:
    """The axes with more than one rank; ``ep`` is one where there is expert parallelism."""
    found = {name: axis(mesh, name) for name in (*NAMES, *([EXPERTS] if experts > 1 else []))}
    return {name: one for name, one in found.items() if one.size() > 1}


def groups_of(axes: Mapping[str, DeviceMesh]) -> dict[str, tuple[int, ...]]:
    """The ranks of this rank's group, along each axis."""
    return {name: tuple(dist.get_process_group_ranks(one.get_group())) for name, one in axes.items()}


def describe(device: torch.device) -> str:
    """``device`` in words, and what is beside it."""
    if device.type != "cuda":
        return f"{device.type} ({os.cpu_count()} cores)"
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    return f"{torch.cuda.get_device_name(device)} ({memory:.0f} GiB, {device.index} of {torch.cuda.device_count()})"


def versions(kind: str) -> dict[str, str]:
    """What all ranks must have alike, on devices of ``kind``."""
    found = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": version("transformers"),
        "shardwright": shardwright.__version__,
    }
    if kind == "cuda":
        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Of all environment variables, those that say how ranks talk to each other."""
    return {name: value for name, value in environment.items() if name.startswith(_SETTINGS)}


def host() -> str:
    """The name of this machine."""
    return socket.gethostname()


def by_group(ranks: Sequence[RankFacts], name: str) -> list[list[RankFacts]]:
    """The groups of ranks along an axis."""
    groups = sorted({one.groups[name] for one in ranks})
    return [[ranks[rank] for rank in group] for group in groups]
