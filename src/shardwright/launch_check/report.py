"""A check as lines of text, the same in a terminal and in a log file."""

from __future__ import annotations

from collections.abc import Sequence
from math import log10

from shardwright.launch_check.facts import RankFacts, by_group

_HEADS = ("axis", "ranks", "groups", "links", "latency", "all-reduce", "of")
_RIGHT = (1, 2, 4, 5, 6)  # columns of numbers


def rank_lines(ranks: Sequence[RankFacts]) -> list[str]:
    """One line for each rank: host, device, place in the mesh, versions."""
    rows = [
        [
            f"rank {one.rank}",
            one.host,
            one.device,
            ", ".join(f"{name} {place}" for name, place in one.coordinates.items()),
            ", ".join(f"{name} {version}" for name, version in one.versions.items()),
        ]
        for one in ranks
    ]
    return _aligned(rows, ())


def axis_lines(ranks: Sequence[RankFacts]) -> list[str]:
    """A table of the axes: the links that the slowest group crosses, and what an all-reduce takes there."""
    if not ranks[0].groups:
        return ["One rank along every axis: there is no link to measure."]
    rows = [list(_HEADS)]
    for name in ranks[0].groups:
        groups = by_group(ranks, name)
        size = len(groups[0])
        measured = [one.measured[name] for one in ranks]
        hosts = max(len({one.host for one in group}) for group in groups)
        seconds = max(one.seconds for one in measured)
        rate = 2 * (size - 1) / size * measured[0].size / seconds
        rows.append(
            [
                name,
                str(size),
                str(len(groups)),
                "within a host" if hosts == 1 else f"between {hosts} hosts",
                f"{_short(max(one.latency for one in measured) * 1e3)} ms",
                f"{_short(rate / 1e9)} GB/s",
                f"{measured[0].size // 2**20} MiB",
            ]
        )
    return _aligned(rows, _RIGHT)


def _short(number: float) -> str:
    """With three digits that count."""
    return f"{number:.{max(0, 2 - int(log10(number))) if number >= 1 else 3}f}"


def _aligned(rows: Sequence[Sequence[str]], right: Sequence[int]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            if width
        ).rstrip()
        for row in rows
    ]
