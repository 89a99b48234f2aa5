"""Ends a rank that waits in a step for ever, and says where it waited."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

HANGS = 70  # exit code of a rank that its watchdog has ended
_NOTICE = 3.0  # seconds in which the ranks tell one another where they are


class Watchdog:
    """Watches the main thread of a rank from another one.

    Args:
        timeout: seconds that a step may take.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._main = threading.get_ident()
        self._ended = threading.Event()
        self._beat = (0, time.monotonic())

    def beat(self, step: int) -> None:
        """``step`` begins."""
        self._beat = (step, time.monotonic())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, a step that takes too long ends the process with exit code 70."""
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(min(self._timeout / 10, 5.0)):
            step, since = self._beat
            if time.monotonic() - since > self._timeout:
                self._end(step)

    def _end(self, step: int) -> None:
        """Tell what is known, on standard error, where the launcher finds it; then end without waiting for anything."""
        frames = traceback.extract_stack(sys._current_frames()[self._main])
        where = _collective(frames) or f"{frames[-1].name} ({frames[-1].filename}:{frames[-1].lineno})"
        silent = _silent_ranks(f"step {step + 1}, in {where}")
        others = f" Nothing was heard of rank(s) {', '.join(map(str, silent))}: look there first." if silent else ""
        stack = "".join(traceback.format_list(frames))
        print(
            f"{stack}\nRank {dist.get_rank()} has been in step {step + 1} for more than {self._timeout:g} seconds, "
            f"waiting in {where}.{others}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(HANGS)


def _collective(frames: traceback.StackSummary) -> str | None:
    """The innermost public function of torch.distributed on the stack: the collective that the rank waits in."""
    inside = [frame.name for frame in frames if "/torch/distributed/" in frame.filename]
    public = [name for name in inside if not name.startswith("_") and name != "wrapper"]
    return f"torch.distributed's {public[-1]}" if public else None


def _silent_ranks(here: str) -> list[int]:
    """Ranks whose watchdogs do not answer: processes that are stopped, gone, or on a machine that is."""
    store = _get_default_store()
    store.set(f"shardwright/hangs/{dist.get_rank()}", here)
    time.sleep(_NOTICE)
    return [rank for rank in range(dist.get_world_size()) if not store.check([f"shardwright/hangs/{rank}"])]
