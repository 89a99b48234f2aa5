"""One block: its modules with their styles, and where every collective happens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from shardwright.estimate.page.document import QUEUES, bytes_of, drawing, table
from shardwright.estimate.predict import Prediction
from shardwright.estimate.views import BlockView

_ROW = 26


def estimate_block(view: BlockView) -> str:
    """The modules, and a table of what the block sends."""
    rows = [
        (
            "backward" if call.backward else "forward", call.axis, f"{call.count} {call.kind.replace('_', '-')}",
            bytes_of(call.bytes),
        )
        for call in view.calls
    ]  # fmt: skip
    heads = ("in", "axis", "collectives", "each, the whole tensor")
    sent = table(heads, rows, numbers=1) if rows else "<p>It sends nothing that its computation waits for.</p>"
    return f"<p><code>{escape(view.name)}</code></p>" + _modules([(*each, []) for each in view.modules]) + sent


def plan_block(found: Prediction) -> str:
    """The modules of the first kind of block, each with the collectives that it is the cause of."""
    glob = next(iter(found.blocks), "")
    traffic = next((part for part in found.traffic if part.where == glob), None)
    causes: dict[str, list[tuple[bool, str]]] = {}
    for call in traffic.collectives if traffic is not None else ():
        causes.setdefault(call.cause, []).append((call.backward, call.kind))
    rows = [row for row in found.rows if row.block == glob]
    known = {row.pattern for row in rows}
    modules = [(row.pattern[len(glob) + 1 :] or "(itself)", row.style, causes.get(row.pattern, [])) for row in rows]
    modules += [(cause, "of several", calls) for cause, calls in causes.items() if cause not in known]
    return f"<p><code>{escape(glob)}</code>, {found.blocks.get(glob, 0)} of them</p>" + _modules(modules)


def _modules(modules: Iterable[tuple[str, str, Sequence[tuple[bool, str]]]]) -> str:
    """A line for each module: its name, its style as a chip, its collectives as arrows."""
    shapes, rows = [], list(modules)
    for place, (name, style, calls) in enumerate(rows):
        y = place * _ROW
        cut = style not in ("replicated", "as around it", "")
        shapes.append(
            f'<text class="strong" x="0" y="{y + 17}">{escape(name)}</text><rect x="290" y="{y + 3}" '
            f'width="{16 + 6.7 * len(style):.0f}" height="20" rx="10" fill="var(--{"compute" if cut else "line"})" '
            f'fill-opacity="{0.22 if cut else 0.5}"/><text class="strong" x="298" y="{y + 17}">{escape(style)}</text>'
        )
        for number, (backward, kind) in enumerate(calls):
            x = 560 + number * 190
            arrow = "M12 0l-8 5 8 5z" if backward else "M4 0l8 5-8 5z"
            words = f"{'backward' if backward else 'forward'}: {kind.replace('_', '-')}"
            shapes.append(
                f'<path d="{arrow}" transform="translate({x} {y + 8})" fill="{QUEUES["tp"]}"/><text x="{x + 18}" '
                f'y="{y + 17}">{escape(words)}</text>'
            )
        shapes.append(f'<line class="axis" x1="0" x2="960" y1="{y + _ROW}" y2="{y + _ROW}"/>')
    return drawing(960, len(rows) * _ROW + 4, shapes, label="The modules of a block and their styles")
