"""The frame of a page: its look in light and dark, on a narrow screen and on paper, and small pieces of HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

PARTS = tuple(f"var(--part-{number})" for number in range(8))
"""Colours of the parts of memory, in the order of :data:`shardwright.estimate.peak.STATES`."""
QUEUES = {name: f"var(--{name})" for name in ("compute", "tp", "cp", "ep", "data")}
"""Colours of computation and of what each axis sends."""

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #16191d; --faint: #5c6470; --line: #d9dde3; --panel: #f5f6f8;
  --good: #18794e; --bad: #c62a2f; --part-0: #3b5bdb; --part-1: #7c9cf5; --part-2: #0b8f7a; --part-3: #b8860b;
  --part-4: #e8b84a; --part-5: #5fc4b3; --part-6: #9c5bd0; --part-7: #d0719f; --compute: #3b5bdb; --tp: #d9480f;
  --cp: #0b8f7a; --ep: #c2255c; --data: #9c5bd0; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e8eaed; --faint: #9aa3ae; --line: #343a43;
  --panel: #1c2026; --good: #4cc38a; --bad: #ff6369; --part-0: #6d8bff; --part-1: #a9bcff; --part-2: #2fb8a0;
  --part-3: #d9a520; --part-4: #f2cf73; --part-5: #86dccd; --part-6: #b98ae6; --part-7: #eb9bc0; --compute: #6d8bff;
  --tp: #ff8a4c; --cp: #2fb8a0; --ep: #f06595; --data: #b98ae6; } }
* { box-sizing: border-box; }
body { background: var(--paper); color: var(--ink); font: 15px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif;
  max-width: 62rem; margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .4rem; text-wrap: balance; }
h2 { font-size: 1.05rem; margin: 2.2rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--line); }
p { margin: .35rem 0; max-width: 48rem; } .good { color: var(--good); } .bad { color: var(--bad); }
.faint { color: var(--faint); font-size: .87rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--faint); font: 12px system-ui, sans-serif; } svg text.strong { fill: var(--ink); }
.scroll { overflow-x: auto; margin-top: .6rem; } .scroll svg { min-width: 34rem; }
.limit { stroke: var(--bad); stroke-dasharray: 6 4; } .axis { stroke: var(--line); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: .5rem 0; font-size: .87rem; color: var(--faint); }
.key { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .45em; }
table { border-collapse: collapse; font-size: .92rem; } .scroll table { min-width: 26rem; }
th { text-align: left; font-weight: 600; color: var(--faint); font-size: .82rem; }
th, td { padding: .22rem 1.2rem .22rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.first td { font-weight: 600; } code { font: .88em ui-monospace, monospace; overflow-wrap: anywhere; }
g.mark:hover > * { stroke: var(--ink); stroke-width: 1.5; }
@media (max-width: 600px) { body { margin: 1rem auto; padding: 0 .8rem; } h1 { font-size: 1.3rem; } }
@media print { :root { --paper: #fff; --ink: #000; --faint: #444; --line: #bbb; --panel: #f3f3f3; }
  body { max-width: none; margin: 0; font-size: 12px; } svg, table, .legend { break-inside: avoid; }
  h2 { break-after: avoid; } .scroll { overflow: visible; } .scroll svg { min-width: 0; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; } }
"""


def document(title: str, body: Iterable[str]) -> str:
    """The whole file."""
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
    )
    return f"{head}{''.join(body)}</body></html>\n"


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """Colours and what they mean."""
    keys = (
        f'<span><span class="key" style="background:{colour}"></span>{escape(name)}</span>' for name, colour in entries
    )
    return f'<div class="legend">{"".join(keys)}</div>'


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: int, first: bool = False) -> str:
    """A table whose last ``numbers`` columns are numbers; cells are text, not HTML.

    Args:
        first: the first row is set off.
    """
    kinds = ["" if place < len(heads) - numbers else ' class="n"' for place in range(len(heads))]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(heads, kinds, strict=True))
    lines = []
    for place, row in enumerate(rows):
        cells = "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row, kinds, strict=True))
        kind = ' class="first"' if first and not place else ""
        lines.append(f"<tr{kind}>{cells}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def drawing(width: float, height: float, shapes: Iterable[str], *, label: str) -> str:
    """An SVG that is as wide as the page, and scrolls where that is narrow.

    Args:
        label: what it shows, for who cannot see it.
    """
    return (
        f'<div class="scroll"><svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'
        f"{''.join(shapes)}</svg></div>"
    )


def bytes_of(size: float) -> str:
    """Bytes with the unit that reads best."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} B"
