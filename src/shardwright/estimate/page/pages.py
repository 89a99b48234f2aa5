"""The pages of ``shardwright plan``, ``estimate`` and ``suggest``."""

from __future__ import annotations

from html import escape

from rich.text import Text

from shardwright.estimate.changes import Change
from shardwright.estimate.estimating import Estimate
from shardwright.estimate.page.block import estimate_block, plan_block
from shardwright.estimate.page.charts import memory_section, scatter, timeline_section
from shardwright.estimate.page.document import PARTS, bytes_of, document, drawing, legend, table
from shardwright.estimate.page.mesh import mesh_drawing, mesh_section
from shardwright.estimate.predict import Prediction
from shardwright.estimate.search import Search
from shardwright.estimate.wording import answer, layout_of, next_better, subject_line, table_rows

_PLAN_NODE = 8  # GPUs of a node in the picture of a plan, which is for no device
_LISTED = 20


def estimate_page(found: Estimate, change: Change | None) -> str:
    """The answer, the mesh, memory, a block and a step."""
    body = [*_answer(answer(found, change), found.fits), f'<p class="faint">{escape(subject_line(found))}</p>']
    body += [_title("The mesh, and what travels over its axes"), _mesh(found)]
    body += [_title("Memory of a rank, from moment to moment of a step"), memory_section(found)]
    body += [_title("A step over time: its last micro-batch"), timeline_section(found)]
    if found.block is not None:
        body += [_title("One block"), estimate_block(found.block)]
    return document(Text.from_markup(answer(found, change)[0]).plain, body)


def plan_page(found: Prediction) -> str:
    """The mesh, a block with its styles and collectives, and what stays on a rank."""
    name = f"{found.model}: {layout_of(found.config)}"
    parts = [
        ("parameters", found.memory.parameters, found.unsharded.parameters),
        ("gradients", found.memory.gradients, found.unsharded.gradients),
        ("AdamW's state", found.memory.optimizer, found.unsharded.optimizer),
    ]
    body = [
        f"<h1>{escape(name)}</h1>",
        f"<p>{found.parameters / 1e9:.3g} billion parameters. The plan comes from {escape(found.plan.source)} and cuts "
        f"{found.cut_share:.1%} of them.</p>",
        _title("The mesh"), mesh_drawing(found.config, _PLAN_NODE),
        _title("One block, and where its collectives happen"), plan_block(found),
        _title("What stays on a rank between steps"), _bars(parts),
    ]  # fmt: skip
    body += [f'<p class="bad">{escape(warning)}</p>' for warning in found.warnings]
    body += [_title("Notes")] * bool(found.notes) + [f'<p class="faint">{escape(note)}</p>' for note in found.notes]
    return document(name, body)


def suggest_page(found: Search) -> str:
    """Layouts as points of memory against speed, a table, and the first one in full."""
    if not found.fitting:
        body = ['<h1 class="bad">No layout fits</h1>']
        if found.nearest is not None:
            body += [scatter([], found.too_large), f"<p>The nearest: {escape(layout_of(found.nearest.config))}.</p>"]
        return document("No layout fits", body)
    best = found.fitting[0]
    body = _answer([f"Yes, {layout_of(best.config)} is the first of {len(found.fitting)} that fit"], True)
    body.append(f'<p class="faint">{escape(subject_line(best))}</p>')
    if found.next_better is not None:
        body.append(f"<p>{escape(next_better(found.next_better, best, found.objective))}</p>")
    body += [_title("Memory against speed"), scatter(found.fitting, found.too_large)]
    heads = ("ranks", "recomputed", "batch", "against the first", "tokens/s", "MFU", "GiB")
    body.append(table(heads, table_rows(found.fitting[:_LISTED]), numbers=3, first=True))
    body += [_title("The first one: its mesh"), _mesh(best)]
    body += [_title("Its memory, from moment to moment of a step"), memory_section(best)]
    body += [_title("Its step over time: the last micro-batch"), timeline_section(best)]
    return document(f"Layouts of {best.model}", body)


def _answer(lines: list[str], good: bool) -> list[str]:
    plain = [escape(Text.from_markup(line).plain) for line in lines]
    return [f'<h1 class="{"good" if good else "bad"}">{plain[0]}</h1>', *(f"<p>{line}</p>" for line in plain[1:])]


def _mesh(found: Estimate) -> str:
    return mesh_section(found.config, found.machine.device.gpus_per_node, found.axes)


def _title(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def _bars(parts: list[tuple[str, int, int]]) -> str:
    """Two stacked bars: a rank's, and one process's."""
    top = max(sum(whole for _, _, whole in parts), 1)
    shapes = []
    sizes = {"on each rank": [rank for _, rank, _ in parts], "unsharded": [whole for _, _, whole in parts]}
    for row, (who, values) in enumerate(sizes.items()):
        x = 110.0
        for (name, _, _), size, colour in zip(parts, values, PARTS, strict=False):
            width = size / top * 840
            shapes.append(
                f'<g class="mark"><title>{name}: {bytes_of(size)}</title><rect x="{x:.1f}" y="{row * 34 + 4}" '
                f'width="{width:.2f}" height="24" fill="{colour}"/></g>'
            )
            x += width
        shapes.append(f'<text class="strong" x="0" y="{row * 34 + 21}">{who}</text>')
    rows = [(name, bytes_of(rank), bytes_of(whole)) for name, rank, whole in parts]
    keys = legend((name, PARTS[number]) for number, (name, _, _) in enumerate(parts))
    return (
        keys
        + drawing(960, 70, shapes, label="Bytes on a rank")
        + table(("", "on each rank", "unsharded"), rows, numbers=2)
    )
