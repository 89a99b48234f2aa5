"""Medians, spreads, and runs that take turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import Any


def spread(values: Sequence[float]) -> str:
    """The middle half of the values: ``first to third quartile``; all of them where they are few."""
    if len(values) < 4:
        return f"{min(values):.3g} to {max(values):.3g}"
    first, _, third = quantiles(values, n=4)
    return f"{first:.3g} to {third:.3g}"


def in_turns(runners: dict[Any, Callable[[], float]], rounds: int) -> dict[Any, list[float]]:
    """``rounds`` measurements of each runner, A B C A B C ...; every other round in the opposite order."""
    measured: dict[Any, list[float]] = {name: [] for name in runners}
    for turn in range(rounds):
        for name in list(runners)[:: 1 if turn % 2 == 0 else -1]:
            measured[name].append(runners[name]())
    return measured


def ratio(mine: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Mine over theirs, round by round: what disturbs a whole round disturbs both."""
    return [a / b for a, b in zip(mine, theirs, strict=True)]


def ratio_text(mine: Sequence[float], theirs: Sequence[float]) -> str:
    values = ratio(mine, theirs)
    return f"{median(values):.2f} ({spread(values)})"
