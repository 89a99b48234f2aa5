"""How long calls take on a device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def timed(
    call: Callable[[], object],
    device: torch.device,
    repeats: int,
    *,
    uncounted: int = 1,
    before: Callable[[], object] | None = None,
) -> list[float]:
    """Seconds of each of ``repeats`` calls, to its end on ``device``.

    Args:
        uncounted: calls ahead of these, which may have to make ready what later ones find.
        before: runs ahead of every call and is not counted, such as a barrier.
    """
    times = []
    for _ in range(uncounted + repeats):
        if before is not None:
            before()
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - start)
    return times[uncounted:]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
