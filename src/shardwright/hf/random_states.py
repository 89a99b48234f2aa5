"""Random states of a trainer's checkpoint, on a mesh that need not be the one that wrote it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardwright.distributed.apply.guards.fresh import Parallelized
from shardwright.distributed.axes import AXES
from shardwright.distributed.mesh import axis_or_none
from shardwright.distributed.runtime.random_states import share_states
from shardwright.hf.arguments import mesh_sizes
from shardwright.hf.checkpoints import saved_mesh


def load_random_states(folder: Path, on: Parallelized, load: Callable[[str], Any]) -> None:
    """Call ``load(folder)``, which sets this rank's states to those of its number.

    On another mesh than the one that wrote them, ranks that share a batch then take those of their first: with dropout
    of their own they would compute different models.
    """
    load(str(folder))
    if saved_mesh(folder) == mesh_sizes(on):
        return
    for axis in AXES:
        along = axis_or_none(on.mesh, axis.name) if axis.one_batch else None
        if along is not None and along.size() > 1:
            share_states(along)
