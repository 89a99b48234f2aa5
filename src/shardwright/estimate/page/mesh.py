"""The mesh as nodes and GPUs, with the ranks of one model and the axes they talk over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from shardwright.distributed.config import ParallelConfig
from shardwright.estimate.page.document import QUEUES, bytes_of, drawing, table
from shardwright.estimate.views import AxisView

NAMES = {
    "tp": "tensor parallelism", "cp": "context parallelism", "ep": "expert parallelism", "efsdp": "shards of experts",
    "dp_shard": "shards of parameters (FSDP2)", "dp_replicate": "replicas",
}  # fmt: skip
_COLOURS = {"tp": QUEUES["tp"], "cp": QUEUES["cp"], "ep": QUEUES["ep"]}
_NODES, _COLUMNS = 8, 4
_CELL, _GAP, _PAD = 26, 4, 10
_BARS = 8  # of height for each axis under the GPUs


def mesh_section(config: ParallelConfig, gpus_per_node: int, axes: Sequence[AxisView]) -> str:
    """A picture of the first nodes, and a table of what travels over each axis in a step."""
    ranks = config.least_world_size
    rows = [
        (
            f"{axis.axis} {axis.ranks}", NAMES[axis.axis], axis.link + ("" if axis.inside else ", between nodes"),
            ", ".join(f"{count} {kind.replace('_', '-')}" for kind, count in axis.calls.items()),
            bytes_of(axis.sent) if axis.sent else "",
        )
        for axis in axes
    ]  # fmt: skip
    told = table(("axis", "ranks share", "over", "collectives a step", "sent by a rank"), rows, numbers=1)
    return mesh_drawing(config, gpus_per_node) + (told if rows else f"<p>{ranks} rank, which sends nothing.</p>")


def mesh_drawing(config: ParallelConfig, gpus_per_node: int) -> str:
    """Nodes as boxes of GPUs. Ranks that share the work of one sequence are joined by a bar in their axis' colour."""
    ranks = config.least_world_size
    each = min(gpus_per_node, ranks)
    nodes = -(-ranks // each)
    shown = min(nodes, _NODES)
    width = each * (_CELL + _GAP) - _GAP + 2 * _PAD
    height = _CELL + 2 * _PAD + 18 + _BARS * sum(size > 1 for size in (config.tp, config.cp, config.ep))
    columns = min(shown, max(1, min(_COLUMNS, 920 // (width + 16))))
    shapes = []
    for node in range(shown):
        x, y = node % columns * (width + 16), node // columns * (height + 12)
        shapes.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="7" fill="var(--panel)" '
            f'stroke="var(--line)"/><text x="{x + _PAD}" y="{y + 15}">node {node}</text>'
        )
        shapes.append("".join(_node(config, node, x, y, each, ranks)))
    rows = -(-shown // columns)
    more = f'<text x="0" y="{rows * (height + 12) + 8}">and {nodes - shown} more nodes like these</text>'
    drawn = drawing(
        max(columns * (width + 16), 620), rows * (height + 12) + (16 if nodes > shown else 0),
        [*shapes, more if nodes > shown else ""], label=f"{ranks} ranks on {nodes} nodes",
    )  # fmt: skip
    return drawn + _reading(config)


def _node(config: ParallelConfig, node: int, x: int, y: int, each: int, ranks: int) -> Iterator[str]:
    model = config.parameter_ranks * config.tp
    top = y + 24
    for place in range(min(each, ranks - node * each)):
        rank = node * each + place
        left = x + _PAD + place * (_CELL + _GAP)
        replica, shard = rank // model, rank % model // (config.cp * config.tp)
        words = (
            f"rank {rank}: tp {rank % config.tp}, cp {rank // config.tp % config.cp}, shard {shard}, replica {replica}"
        )
        shade = 0.16 if shard % 2 else 0.34
        yield (
            f'<g class="mark"><title>{escape(words)}</title><rect x="{left}" y="{top}" width="{_CELL}" '
            f'height="{_CELL}" rx="4" fill="var(--data)" fill-opacity="{shade}"/>'
            f'<text class="strong" x="{left + _CELL / 2}" y="{top + 17}" text-anchor="middle" '
            f'style="font-size:10px">{rank}</text></g>'
        )
    yield from _bars(config, x, top + _CELL + 4, node * each, min(each, ranks - node * each))


def _bars(config: ParallelConfig, x: int, y: int, first: int, count: int) -> Iterator[str]:
    """Under the GPUs of a node: a bar for each group of an axis, as far as it lies in the node."""
    row = 0
    for axis, size in (("tp", config.tp), ("cp", config.cp * config.tp), ("ep", config.ep)):
        if (config.cp if axis == "cp" else size) == 1:
            continue
        for start in range(0, count, size):
            left = x + _PAD + start * (_CELL + _GAP)
            length = min(size, count - start) * (_CELL + _GAP) - _GAP
            group = (first + start) // size
            yield (
                f'<g class="mark"><title>{axis} group {group}</title><rect x="{left}" y="{y + row * _BARS}" '
                f'width="{length}" height="5" rx="2.5" fill="{_COLOURS[axis]}"/></g>'
            )
        row += 1


def _reading(config: ParallelConfig) -> str:
    degrees = {"tp": config.tp, "cp": config.cp, "ep": config.ep}
    bars = ", ".join(
        f'<span style="color:{_COLOURS[axis]}">{axis} {size}</span>' for axis, size in degrees.items() if size > 1
    )
    joined = f" A bar joins the ranks of {bars}." if bars else ""
    return f'<p class="faint">Every square is a GPU. Shades alternate from shard to shard.{joined}</p>'
