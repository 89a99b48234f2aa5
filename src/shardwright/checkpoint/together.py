"""Ranks that do one thing together: all of them come, and all of them get the same error."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from shardwright._torch import default_store
from shardwright.errors import CheckpointError, ShardwrightError


def rank_and_world() -> tuple[int, int]:
    """``(0, 1)`` without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier(group: dist.ProcessGroup | None = None) -> None:
    if dist.is_initialized():
        dist.barrier(group)


def all_here(what: str, timeout: float, token: str = "") -> None:
    """Wait until every rank has called this for ``what``.

    It goes through the store that the process group was made with, so that a rank that comes alone gets an error
    after ``timeout`` seconds and not a collective that waits for ever; it then takes its name off the list again.

    Args:
        what: names the call in the error.
        timeout: in seconds.
        token: the same on all ranks; counts come to nothing under another one.

    Raises:
        CheckpointError: not all ranks came in time.
    """
    _, world = rank_and_world()
    if world == 1:
        return
    store, key = default_store(), f"shardwright/all_here/{token}/{what}"
    full = -(-store.add(key, 1) // world) * world  # ranks that come to the same thing again start the next round
    deadline, pause = time.monotonic() + timeout, 0.001
    while (came := store.add(key, 0)) < full:
        if time.monotonic() > deadline:
            store.add(key, -1)
            raise CheckpointError(
                f"{what}: {came - (full - world)} of {world} ranks came within {timeout:g} seconds. Every rank has to "
                "make this call: take it out of any `if rank == 0`, or raise the timeout if ranks are that far apart."
            )
        time.sleep(pause)
        pause = min(2 * pause, 0.2)


@contextmanager
def same_error_everywhere(what: str, group: dist.ProcessGroup | None = None) -> Generator[None, None, None]:
    """Run a body without collectives on every rank; where it fails on one, all ranks raise the first rank's error.

    Raises:
        ShardwrightError: this rank's own error, if it has one.
        CheckpointError: the first failing rank's message, on the ranks that had no error.
    """
    error: ShardwrightError | None = None
    try:
        yield
    except ShardwrightError as caught:
        error = caught
    except OSError as caught:
        error = CheckpointError(f"{what} failed: {caught}.")
        error.__cause__ = caught
    messages = from_all(None if error is None else str(error), group)
    failed = [rank for rank, message in enumerate(messages) if message is not None]
    if error is not None:
        raise error
    if failed:
        raise CheckpointError(f"On rank {failed[0]}: {messages[failed[0]]}")


def from_all(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """``value`` of every rank, by rank."""
    _, world = rank_and_world()
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value, group=group)
    return values
