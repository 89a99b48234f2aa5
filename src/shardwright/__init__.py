"""Shardwright: run any transformer sharded over many GPUs, and prove that it is the same function.

Importing this package imports no torch; the names below are loaded when first used.

Further modules: :mod:`shardwright.distributed.parallelizer` (what NeMo Automodel's module of that name offers),
:mod:`shardwright.losses`, :mod:`shardwright.verify`, :mod:`shardwright.estimate`, :mod:`shardwright.errors`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardwright.api import parallelize
    from shardwright.checkpoint.full import full_weights
    from shardwright.checkpoint.load import init_pretrained, load_adapted, load_pretrained
    from shardwright.checkpoint.save import save_pretrained
    from shardwright.distributed.apply.batches import shard_batch
    from shardwright.distributed.config import ParallelConfig
    from shardwright.distributed.mesh import make_mesh
    from shardwright.distributed.plan import ParallelPlan
    from shardwright.distributed.runtime.norms import gradient_norms

__version__ = "0.1.0"

_HOMES = {
    "ParallelConfig": "shardwright.distributed.config",
    "ParallelPlan": "shardwright.distributed.plan",
    "full_weights": "shardwright.checkpoint.full",
    "gradient_norms": "shardwright.distributed.runtime.norms",
    "init_pretrained": "shardwright.checkpoint.load",
    "load_adapted": "shardwright.checkpoint.load",
    "load_pretrained": "shardwright.checkpoint.load",
    "make_mesh": "shardwright.distributed.mesh",
    "parallelize": "shardwright.api",
    "save_pretrained": "shardwright.checkpoint.save",
    "shard_batch": "shardwright.distributed.apply.batches",
}
_MODULES = ("errors", "estimate", "losses", "verify")

__all__ = [
    "ParallelConfig",
    "ParallelPlan",
    "full_weights",
    "gradient_norms",
    "init_pretrained",
    "load_adapted",
    "load_pretrained",
    "make_mesh",
    "parallelize",
    "save_pretrained",
    "shard_batch",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES, "__version__"})
