"""One self-contained HTML file about an estimate: memory from moment to moment, and a step over time. No scripts."""

from __future__ import annotations

from html import escape

from shardwright.estimate.estimate_command import NAMES, gib, layout_of
from shardwright.estimate.estimating import Estimate, largest_parts
from shardwright.estimate.peak import STATES
from shardwright.estimate.timeline import AXES, COMPUTE, DATA, Span

_COLOURS = ("#4269d0", "#6cc5b0", "#efb118", "#a463f2", "#9c6b4e", "#ff8ab7", "#3ca951", "#97bbf5")
_QUEUES = {COMPUTE: (0, "#4269d0"), DATA: (1, "#a463f2")} | dict.fromkeys(AXES.values(), (0, "#ff725c"))
_WIDTH, _HEIGHT, _LEFT = 960, 260, 60
_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1e23; --faint: #6b7280; --line: #d5d9e0; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181d; --ink: #e6e8eb; --faint: #9aa3ad; --line: #363c45; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 64rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; } p { margin: .3rem 0; }
.faint, text { color: var(--faint); fill: var(--faint); font-size: 12px; }
svg { width: 100%; height: auto; } .limit { stroke: #e5484d; stroke-dasharray: 6 4; } .axis { stroke: var(--line); }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
table { border-collapse: collapse; } td { padding: .15rem 1rem .15rem 0; } td.n { text-align: right; }
@media print { body { max-width: none; margin: 0; } }
"""


def page(found: Estimate) -> str:
    """The whole file."""
    device = found.machine.device
    answer = (
        f"Fits, with {gib(found.free)} GiB free" if found.fits else f"Does not fit: {gib(-found.free)} GiB too much"
    )
    speed = found.speed
    body = [
        f"<h1>{answer}</h1>",
        f"<p>{gib(found.memory)} of {gib(device.memory)} GiB on each {escape(device.name)}.</p>",
        f"<p class=faint>{escape(found.model)}, {found.parameters / 1e9:.2f} billion parameters, on "
        f"{found.config.least_world_size} ranks: {escape(layout_of(found.config))}; {found.workload.batch_size} x "
        f"{found.workload.seq_len} tokens a micro-batch; {escape(found.workload.optimizer)}</p>",
        "<h2>Memory of a rank, from moment to moment of a step</h2>",
        _memory(found),
        _parts(found),
        f"<h2>A step: about {speed.step:.3g} s, {speed.tokens_per_second:,.0f} tokens/s on each GPU, MFU "
        f"{speed.mfu:.1%}</h2>",
        _timeline(list(speed.timeline.spans), speed.timeline.end),
        f"<p>Beside computation it waits for {speed.waits_for[0]} most: {speed.waits_for[1]:.1%} of a step.</p>",
    ]
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(answer)}</title><style>{_STYLE}</style>"
    return head + "".join(body) + "</html>\n"


def _memory(found: Estimate) -> str:
    """A stacked bar for each moment, and the device's limit."""
    limit = found.machine.device.memory - found.overheads.total
    top = 1.08 * max(limit, found.peak.total)
    step = (_WIDTH - _LEFT) / len(found.moments)
    drawn = []
    for place, moment in enumerate(found.moments):
        x, below = _LEFT + place * step, 0.0
        title = f"{moment.phase} {moment.where or 'outside of the blocks'}: {gib(moment.total)} GiB"
        bars = []
        for name, colour in zip(STATES, _COLOURS, strict=True):
            height = moment.parts[name] / top * _HEIGHT
            bars.append(
                f'<rect x="{x:.2f}" y="{_HEIGHT - below - height:.2f}" width="{step + 0.1:.2f}" '
                f'height="{height:.2f}" fill="{colour}"/>'
            )
            below += height
        drawn.append(f"<g><title>{escape(title)}</title>{''.join(bars)}</g>")
    y = _HEIGHT - limit / top * _HEIGHT
    ticks = "".join(
        f'<text x="{_LEFT - 8}" y="{_HEIGHT - share * _HEIGHT + 4:.1f}" text-anchor="end">'
        f"{top * share / 2**30:.0f} GiB</text>"
        for share in (0.25, 0.5, 0.75)
    )
    line = f'<line class="limit" x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
    label = f'<text x="{_WIDTH}" y="{y - 5:.1f}" text-anchor="end">{limit / 2**30:.1f} GiB are there for tensors</text>'
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + 6}">{"".join(drawn)}{line}{label}{ticks}</svg>'


def _parts(found: Estimate) -> str:
    colours = dict(zip(STATES, _COLOURS, strict=True))
    at = found.peak
    rows = [
        f'<tr><td><span class=key style="background:{colours[name]}"></span>{NAMES[name]}</td>'
        f"<td class=n>{gib(size)} GiB</td></tr>"
        for name, size in largest_parts(at.parts)
    ]
    rows.append(
        f"<tr><td>context, communicators, fragmentation</td><td class=n>{gib(found.overheads.total)} GiB</td></tr>"
    )
    where = at.where or "what is outside of the blocks"
    return f"<p>At the peak, {at.phase} of {where}:</p><table>{''.join(rows)}</table>"


def _timeline(spans: list[Span], end: float) -> str:
    """The two queues of a micro-batch."""
    scale = (_WIDTH - _LEFT - 40) / end
    bars = "".join(
        f'<rect x="{_LEFT + 40 + span.start * scale:.2f}" y="{10 + 40 * _QUEUES[span.queue][0]}" '
        f'width="{max(span.seconds * scale, 0.3):.2f}" height="30" fill="{_QUEUES[span.queue][1]}">'
        f"<title>{escape(span.queue)}: {escape(span.name)}, {span.seconds * 1e3:.2f} ms</title></rect>"
        for span in spans
    )
    names = '<text x="0" y="30">computation</text><text x="0" y="70">FSDP2</text>'
    return f'<svg viewBox="0 0 {_WIDTH} 90">{names}{bars}</svg>'
