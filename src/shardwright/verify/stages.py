"""What a failure means depends on when it happens."""

from __future__ import annotations

import traceback
from pathlib import Path

from shardwright.errors import ConfigError, ShardwrightError


class ShrinkError(ConfigError):
    """A model that verify cannot run in one process, or whose config it cannot make small."""


class CrashError(ShardwrightError, RuntimeError):
    """A sharded model that raised where the same model in one process did not."""


class Stage:
    """Turns what leaves the block into an error that says what was going on; Shardwright's own errors pass."""

    def __init__(self, kind: type[ShardwrightError], what: str) -> None:
        self.kind, self.what = kind, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, ShardwrightError):
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}, line {where.lineno}, in {where.name}"
            raise self.kind(f"{self.what}: {type(error).__name__}: {error} ({place}).") from error
