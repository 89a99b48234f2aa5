"""Which training checkpoints a folder has, and what one says about its run. Standard library only.

A checkpoint is a folder ``step-00000120`` with

- ``state/``: model and optimizer, written by torch.distributed.checkpoint, readable at any mesh;
- ``random-00003.safetensors``: the random states of rank 3;
- ``model/``: config and tokenizer, so that ``shardwright export`` needs nothing else;
- ``run.json``: step, data position, schedule, metric, mesh, versions;
- ``manifest.json``: size and checksum of every other file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from shardwright.checkpoint.manifest import MANIFEST
from shardwright.errors import CheckpointError
from shardwright.untrusted import read_json, shown, usable_path

RUN = "run.json"
STATE = "state"
DESCRIPTION = "model"
NAME = re.compile(r"step-\d{8}")
SET_ASIDE = re.compile(r"\.step-\d{8}\.replaced\d*")  # one that another run, or another branch of this one, has left
_BYTES = 64 * 2**20  # the names of all parameters are in it
_MOST_STEPS = 10**8 - 1  # what the name of a checkpoint has room for


@dataclass(frozen=True)
class RunInfo:
    """What ``run.json`` says.

    Attributes:
        step: optimizer steps that have been taken.
        progress: the caller's own data (position in the data, losses, ...), JSON.
        metric: what the best checkpoint is chosen by, less is better; None: not measured.
        state: :meth:`shardwright.checkpoint.state.RunState.data`.
        world_size: ranks that wrote it.
        notes: the caller's description of the run (degrees, config), for people and for ``shardwright inspect``.
        versions: of torch, transformers and Shardwright.
        saved: when, in UTC.
    """

    step: int
    progress: dict[str, Any]
    metric: float | None
    state: dict[str, Any]
    world_size: int
    notes: dict[str, Any]
    versions: dict[str, str]
    saved: str


_KINDS: dict[str, tuple[type, ...]] = {
    "step": (int,),
    "progress": (dict,),
    "metric": (float, int, type(None)),
    "state": (dict,),
    "world_size": (int,),
    "notes": (dict,),
    "versions": (dict,),
    "saved": (str,),
}


def read_info(folder: Path) -> RunInfo:
    """What ``run.json`` in ``folder`` says.

    Raises:
        CheckpointError: it cannot be read, or is of another format.
    """
    file = folder / RUN
    data = read_json(file, CheckpointError, _BYTES)
    names = [field.name for field in fields(RunInfo)]
    if not isinstance(data, Mapping) or set(data) != set(names):
        raise CheckpointError(f"{file} must hold {', '.join(names)}; it holds {shown(data)}.")
    for name in names:
        if type(data[name]) not in _KINDS[name]:
            kinds = " or ".join(kind.__name__ for kind in _KINDS[name])
            raise CheckpointError(f"{name} in {file} is {shown(data[name])}; it must be of type {kinds}.")
    info = RunInfo(**data)
    for name, value, least, most in (("step", info.step, 1, _MOST_STEPS), ("world_size", info.world_size, 1, 2**20)):
        if not least <= value <= most:
            raise CheckpointError(f"{name} in {file} is {value}; it must be between {least} and {most:,}.")
    if info.metric is not None and not math.isfinite(info.metric):
        raise CheckpointError(f"metric in {file} is {info.metric}; it must be a finite number.")
    if NAME.fullmatch(folder.name) and int(folder.name.removeprefix("step-")) != info.step:
        raise CheckpointError(f"{file} says step {info.step}, but the folder is {folder.name}.")
    if not isinstance(info.state.get("groups"), list):
        raise CheckpointError(f"state in {file} has no list 'groups'.")
    return info


def list_checkpoints(root: Path) -> list[Path]:
    """The whole checkpoints in ``root``, oldest first."""
    found = root.iterdir() if root.is_dir() else []
    return sorted(path for path in found if NAME.fullmatch(path.name) and (path / MANIFEST).is_file())


def find_checkpoint(path: Path) -> Path:
    """``path`` itself, or the newest checkpoint in it.

    Raises:
        CheckpointError: neither.
    """
    path = usable_path(path, "The checkpoint", CheckpointError)
    if not path.exists():
        raise CheckpointError(f"There is no {path} (looked from {Path.cwd()}).")
    if (path / RUN).is_file():
        return path
    for root in (path, path / "checkpoints"):
        if found := list_checkpoints(root):
            return found[-1]
    raise CheckpointError(f"{path} is no training checkpoint and contains none (a folder such as step-00000100).")
