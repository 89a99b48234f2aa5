"""The earlier address of ``shardwright.distributed.planning.derive.derive_plan``, for scripts that import it here."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name != "derive_plan":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("shardwright.distributed.planning.derive").derive_plan
