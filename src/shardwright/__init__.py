"""Shardwright: run any transformer sharded over many GPUs, and prove that it is the same function.

Importing this package imports no torch; the names below are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardwright.api import parallelize
    from shardwright.checkpoint.load import init_pretrained, load_pretrained
    from shardwright.checkpoint.save import save_pretrained
    from shardwright.distributed.config import ParallelConfig
    from shardwright.distributed.mesh import make_mesh
    from shardwright.distributed.plan import ParallelPlan

__version__ = "0.1.0"

_HOMES = {
    "ParallelConfig": "shardwright.distributed.config",
    "ParallelPlan": "shardwright.distributed.plan",
    "init_pretrained": "shardwright.checkpoint.load",
    "load_pretrained": "shardwright.checkpoint.load",
    "make_mesh": "shardwright.distributed.mesh",
    "parallelize": "shardwright.api",
    "save_pretrained": "shardwright.checkpoint.save",
}

__all__ = [
    "ParallelConfig",
    "ParallelPlan",
    "init_pretrained",
    "load_pretrained",
    "make_mesh",
    "parallelize",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'shardwright' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
