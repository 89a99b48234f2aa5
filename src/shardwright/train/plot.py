"""A curve in a terminal, from characters alone."""

from __future__ import annotations

from collections.abc import Sequence

_EIGHTHS = " ▁▂▃▄▅▆▇█"


def curve(values: Sequence[float], width: int = 64, height: int = 10, ascii_only: bool = False) -> list[str]:
    """The lines of a filled curve of ``values``, one per step from step 1, with its axes.

    Several steps that share a column are averaged; a run shorter than ``width`` is stretched.
    """
    columns = resample(values, width)
    low, high = min(columns), max(columns)
    levels = [round((value - low) / ((high - low) or 1) * (height * 8 - 1)) + 1 for value in columns]
    lines = []
    for row in reversed(range(height)):
        cells = (min(max(level - row * 8, 0), 8) for level in levels)
        drawn = "".join(("#" if cell >= 4 else " ") if ascii_only else _EIGHTHS[cell] for cell in cells)
        label = {height - 1: f"{high:.2f}", 0: f"{low:.2f}"}.get(row, "")
        lines.append(f"{label:>7} {'|' if ascii_only else '│'}{drawn}")
    corner = "        " + ("+" + "-" * width if ascii_only else "└" + "─" * width)
    last = f"step {len(values)}"
    return [*lines, corner, f"         {'step 1':<{width - len(last)}}{last}"]


def resample(values: Sequence[float], width: int) -> list[float]:
    """``values`` as ``width`` means of consecutive parts; a part has at least one value."""
    n = len(values)
    parts = []
    for column in range(width):
        start = column * n // width
        stop = max((column + 1) * n // width, start + 1)
        parts.append(sum(values[start:stop]) / (stop - start))
    return parts
