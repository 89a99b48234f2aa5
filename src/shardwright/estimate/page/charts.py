"""Memory from moment to moment, a step over time, and layouts as points of memory against speed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from shardwright.estimate.estimating import Estimate, largest_parts
from shardwright.estimate.page.document import PARTS, QUEUES, drawing, legend, table
from shardwright.estimate.peak import STATES, Moment
from shardwright.estimate.timeline import AXES, COMPUTE, DATA, Span
from shardwright.estimate.wording import NAMES, gib, layout_of

_WIDTH, _HEIGHT, _LEFT = 960, 260, 64
_COLOUR_OF = {COMPUTE: QUEUES["compute"], DATA: QUEUES["data"]} | {queue: QUEUES[axis] for axis, queue in AXES.items()}


def memory_section(found: Estimate) -> str:
    """Stacked bars against what the device has for tensors, and the parts of the peak."""
    limit = found.machine.device.memory - found.overheads.total
    top = 1.1 * max(limit, found.peak.total)
    step = (_WIDTH - _LEFT) / len(found.moments)
    peak = max(range(len(found.moments)), key=lambda place: found.moments[place].total)
    shapes = [_bar(moment, _LEFT + place * step, step, top) for place, moment in enumerate(found.moments)]
    shapes += _axis(top, "GiB")
    y, x = _HEIGHT - limit / top * _HEIGHT, _LEFT + (peak + 0.5) * step
    shapes.append(
        f'<line class="limit" x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{_LEFT + 6}" y="{y - 6:.1f}">'
        f"{gib(limit)} GiB are there for tensors</text>"
    )
    above = _HEIGHT - found.peak.total / top * _HEIGHT
    shapes.append(
        f'<path d="M{x - 5:.1f} {above - 9:.1f}h10l-5 7z" fill="var(--ink)"/><text class="strong" '
        f'x="{min(x, _WIDTH - 60):.1f}" y="{above - 14:.1f}" text-anchor="middle">'
        f"peak {gib(found.peak.total)} GiB</text>"
    )
    shapes += _phases(found.moments, step)
    used = {name for moment in found.moments for name, size in moment.parts.items() if size}
    keys = [(NAMES[name], colour) for name, colour in zip(STATES, PARTS, strict=True) if name in used]
    drawn = drawing(_WIDTH, _HEIGHT + 22, shapes, label="Memory of a rank from moment to moment of a step")
    return legend(keys) + drawn + _peak_table(found)


def _bar(moment: Moment, x: float, width: float, top: float) -> str:
    below, bars = 0.0, []
    for name, colour in zip(STATES, PARTS, strict=True):
        height = moment.parts[name] / top * _HEIGHT
        if height >= 0.05:  # less is not to be seen
            bars.append(
                f'<rect x="{x:.2f}" y="{_HEIGHT - below - height:.2f}" width="{width + 0.1:.2f}" '
                f'height="{height:.2f}" fill="{colour}"/>'
            )
        below += height
    title = f"{moment.phase}, {moment.where or 'outside of the blocks'}: {gib(moment.total)} GiB"
    return f"<g><title>{escape(title)}</title>{''.join(bars)}</g>"


def _phases(moments: Sequence[Moment], step: float) -> Iterator[str]:
    """The names of forward, backward and step under the bars, where there is room for them."""
    start = 0
    for place in range(1, len(moments) + 1):
        if place == len(moments) or moments[place].phase != moments[start].phase:
            left, right = _LEFT + start * step, _LEFT + place * step
            yield f'<line class="axis" x1="{left:.1f}" x2="{left:.1f}" y1="{_HEIGHT}" y2="{_HEIGHT + 8}"/>'
            if right - left > 50:
                yield f'<text x="{left + 5:.1f}" y="{_HEIGHT + 16}">{moments[start].phase}</text>'
            start = place


def _axis(top: float, unit: str) -> Iterator[str]:
    yield f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH}" y1="{_HEIGHT}" y2="{_HEIGHT}"/>'
    for share in (0.25, 0.5, 0.75):
        y = _HEIGHT * (1 - share)
        yield (
            f'<line class="axis" x1="{_LEFT - 4}" x2="{_LEFT}" y1="{y}" y2="{y}"/><text x="{_LEFT - 8}" y="{y + 4}" '
            f'text-anchor="end">{top * share / 2**30:.0f} {unit}</text>'
        )


def _peak_table(found: Estimate) -> str:
    at = found.peak
    rows = [(NAMES[name], f"{gib(size)} GiB") for name, size in largest_parts(at.parts)]
    rows.append(("allowances: context, communicators, fragmentation", f"{gib(found.overheads.total)} GiB"))
    rows.append(("needed on the device", f"{gib(found.memory)} GiB"))
    title = f"at the peak, {at.phase} of {at.where or 'what is outside of the blocks'}"
    return table((title, ""), rows, numbers=1)


def timeline_section(found: Estimate) -> str:
    """The two queues of a micro-batch, and what a step is spent on."""
    line, speed = found.speed.timeline, found.speed
    used = [queue for queue in _COLOUR_OF if line.busy(queue)]
    names = {COMPUTE: "computation", DATA: "gathers and reductions of FSDP2"}
    names |= {queue: f"collectives of {queue}" for queue in AXES.values()}
    scale = (_WIDTH - _LEFT - 36) / line.end
    shapes = [_span(span, _LEFT + 36, scale) for span in line.spans]
    shapes.append('<text class="strong" x="0" y="30">in turn</text><text class="strong" x="0" y="74">beside it</text>')
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = _LEFT + 36 + share * line.end * scale
        anchor = "end" if share == 1 else "middle" if share else "start"
        shapes.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="92" y2="98"/><text x="{x:.1f}" y="112" '
            f'text-anchor="{anchor}">{line.end * share:.3g} s</text>'
        )
    drawn = drawing(_WIDTH, 116, shapes, label="One micro-batch of a rank over time")
    parts = [("computation", speed.compute)]
    parts += [(f"collectives of {AXES[axis]}", seconds) for axis, seconds in speed.collectives.items() if seconds]
    parts += [("waiting for FSDP2", speed.exposed), ("clipping and optimizer", speed.optimizer)]
    rows = [(name, f"{seconds:.4g} s", f"{seconds / speed.step:.1%}") for name, seconds in parts]
    keys = legend((names[queue], _COLOUR_OF[queue]) for queue in used)
    return keys + drawn + table(("of a step", "", "share"), rows, numbers=2)


def _span(span: Span, left: float, scale: float) -> str:
    y = 54 if span.queue == DATA else 10
    words = f"{span.queue}: {span.name}, {span.seconds * 1e3:.3g} ms"
    return (
        f'<g class="mark"><title>{escape(words)}</title><rect x="{left + span.start * scale:.2f}" y="{y}" '
        f'width="{max(span.seconds * scale, 0.3):.2f}" height="32" fill="{_COLOUR_OF[span.queue]}"/></g>'
    )


def scatter(fitting: Sequence[Estimate], others: Sequence[Estimate]) -> str:
    """Layouts: memory to the right, tokens a second upwards; those that do not fit are hollow.

    Args:
        fitting: the best first, which is marked.
        others: that do not fit; those far to the right of the device's memory are left out.
    """
    limit = fitting[0].machine.device.memory if fitting else others[0].machine.device.memory
    shown = [*fitting, *(made for made in others if made.memory < 2 * limit)]
    right = 1.05 * max([limit, *(made.memory for made in shown)])
    top = 1.12 * max(made.speed.tokens_per_second for made in shown)
    x0, wide, high = _LEFT, _WIDTH - _LEFT - 10, 300

    def at(made: Estimate) -> tuple[float, float]:
        return x0 + made.memory / right * wide, high * (1 - made.speed.tokens_per_second / top)

    shapes = [f'<line class="axis" x1="{x0}" x2="{_WIDTH}" y1="{high}" y2="{high}"/>']
    for share in (0.25, 0.5, 0.75, 1.0):
        x, y = x0 + share * wide, high * (1 - share)
        shapes.append(f'<text x="{x:.0f}" y="{high + 18}" text-anchor="middle">{right * share / 2**30:.0f} GiB</text>')
        shapes.append(f'<text x="{x0 - 8}" y="{y + 4:.0f}" text-anchor="end">{top * share:,.0f}</text>')
    x = x0 + limit / right * wide
    shapes.append(
        f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{high}"/><text x="{x - 6:.1f}" y="12" '
        f'text-anchor="end">memory of the device</text><text x="0" y="-10">tokens/s of a GPU</text>'
    )
    for made in reversed(shown):
        best = bool(fitting) and made is fitting[0]
        cx, cy = at(made)
        colour = QUEUES["tp" if best else "compute"]
        shapes.append(
            f'<g class="mark"><title>{escape(_told(made))}</title><circle cx="{cx:.1f}" cy="{cy:.1f}" '
            f'r="{7 if best else 5}" fill="{colour if made.fits else "none"}" fill-opacity="0.75" stroke="{colour}" '
            f'pointer-events="all"/></g>'
        )
    keys = legend([("the first", QUEUES["tp"]), ("fits", QUEUES["compute"])])
    return keys + drawing(_WIDTH, high + 52, ['<g transform="translate(0 24)">', *shapes, "</g>"], label="Layouts")


def _told(made: Estimate) -> str:
    lacks = "" if made.fits else f", lacks {gib(-made.free)} GiB"
    return (
        f"{layout_of(made.config)}; {made.workload.batch_size} x {made.workload.accumulation}: "
        f"{made.speed.tokens_per_second:,.0f} tokens/s, {gib(made.memory)} GiB{lacks}"
    )
