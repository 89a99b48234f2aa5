"""Proof that a sharded model is the same function as the model in one process.

>>> from shardwright import ParallelConfig
>>> from shardwright.verify import verify
>>> report = verify("qwen3", ParallelConfig(tp=2, sequence_parallel=True))  # doctest: +SKIP
>>> report.exact  # doctest: +SKIP
True
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardwright.verify.compare import Report
    from shardwright.verify.public import verify
    from shardwright.verify.ranks import RankPool

_HOMES = {
    "RankPool": "shardwright.verify.ranks",
    "Report": "shardwright.verify.compare",
    "verify": "shardwright.verify.public",
}

__all__ = ["RankPool", "Report", "verify"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'shardwright.verify' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
