"""The prediction as a report for people: tables in a terminal, plain columns in a pipe."""

from __future__ import annotations

import io
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from shardwright.distributed.precision import MODEL
from shardwright.estimate.predict import Prediction
from shardwright.estimate.rows import Row
from shardwright.estimate.traffic import Collective

_PIPE_WIDTH = 1000  # wide enough that nothing wraps
_ROOMY = 100  # columns from which on nothing needs to be folded
_NARROW_STYLE = 21  # columns for a style name in a narrow terminal: most fit


def print_report(prediction: Prediction, console: Console) -> None:
    """Write the report. A console that is no terminal gets plain text, one line per row, nothing cut off."""
    if console.is_terminal:
        for part in _parts(prediction, _Look(narrow=console.width < _ROOMY)):
            console.print(part, highlight=False)
        return
    text = Console(file=io.StringIO(), width=_PIPE_WIDTH, no_color=True)
    for part in _parts(prediction, _Look(plain=True)):
        text.print(part, highlight=False)
    for line in text.file.getvalue().splitlines():  # type: ignore[attr-defined]
        console.file.write(line.rstrip() + "\n")


@dataclass(frozen=True)
class _Look:
    plain: bool = False
    narrow: bool = False

    def table(self) -> Table:
        return Table(
            box=None if self.plain else box.SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 2 if self.plain else 1, 0, 0),
            header_style="" if self.plain else "bold",
            show_edge=False,
        )

    def style_name(self, style: str) -> str:
        """A long style name on two lines where there is little room."""
        if not self.narrow:
            return style
        lines = textwrap.wrap(style.replace("_", "_ "), _NARROW_STYLE, break_long_words=False)
        return "\n".join(line.replace(" ", "") for line in lines)

    def heading(self, text: str) -> str:
        """A heading, on two lines in a terminal."""
        return text if self.plain else "\n".join(re.split("[- ]", text, maxsplit=1))

    def shade(self, style: str) -> str:
        return "" if self.plain else style


def _parts(prediction: Prediction, look: _Look) -> Iterable[RenderableType]:
    yield Text.assemble((prediction.model, "bold"), f"  {_head_line(prediction)}")
    yield _degrees(prediction)
    yield Text.assemble(
        "plan from ", (prediction.plan.source, "bold"), f", cuts {_percent(prediction.cut_share)} of the parameters"
    )
    named = prediction.config.precision.param
    computed = prediction.weights if named == MODEL else named
    yield f"weights kept in {prediction.weights}, a step computed in {computed}"
    yield ""
    yield _modules(prediction, look)
    yield ""
    yield from _local_sizes(prediction)
    yield _memory(prediction, look)
    yield ""
    yield from _traffic(prediction, look)
    yield from _gathering(prediction)
    for warning in prediction.warnings:
        yield Text.assemble(("warning: ", "bold red"), warning)
    for note in prediction.notes:
        yield Text.assemble(("note: ", "bold yellow"), note)


def _head_line(prediction: Prediction) -> str:
    blocks = ", ".join(f"{count} x {glob}" for glob, count in prediction.blocks.items()) or "no repeated blocks"
    return f"{count_text(prediction.parameters)} parameters, {blocks}"


def _degrees(prediction: Prediction) -> str:
    config = prediction.config
    sequence = " + sequence parallel" if config.sequence_parallel else ""
    ranks = config.least_world_size
    replicas = f" x dp_replicate {config.dp_replicate}" if config.dp_replicate > 1 else ""
    experts = f", ep {config.ep} among them" if config.ep > 1 else ""
    context = f" x cp {config.cp}" if config.cp > 1 else ""
    degrees = f"tp {config.tp}{sequence}{context} x dp_shard {config.dp_shard}{replicas}"
    return f"{degrees} = {ranks} rank{'s' * (ranks > 1)}{experts}"


def _modules(prediction: Prediction, look: _Look) -> Table:
    table = look.table()
    table.add_column("module", no_wrap=not look.narrow, overflow="fold")
    table.add_column("style", no_wrap=True)
    table.add_column("from", overflow="fold")
    for name in ("params", "cut", "per rank"):
        table.add_column(name, justify="right", no_wrap=True)
    for block, rows in groupby(prediction.rows, key=lambda row: row.block):
        if block and not look.plain:
            table.add_row(Text(f"{block} x {prediction.blocks[block]}", style="bold"))
        for row in rows:
            _add(table, row, look)
    return table


def _add(table: Table, row: Row, look: _Look) -> None:
    name = row.pattern if look.plain or not row.block else f"  {row.pattern[len(row.block) + 1 :] or '(itself)'}"
    share = "" if row.share is None else _percent(row.share)
    size = bytes_text(row.memory.total) if row.parameters else ""
    count = count_text(row.parameters) if row.parameters else ""
    shade = {"no rule": "dim", "tie": "cyan", "sequence parallelism": "cyan"}.get(row.source, "")
    table.add_row(name, look.style_name(row.style), Text(_origin(row), style=shade), count, share, size)


def _origin(row: Row) -> str:
    """Why the row has its style: ``plan``, with the rule where that is not the row's own name, or what else it was."""
    if row.source in ("tie", "experts"):
        return row.rule
    if row.source in ("no rule", "sequence parallelism"):
        return row.source.removesuffix(" parallelism")
    return "plan" if row.rule == row.pattern else f"plan: {row.rule}"


def _local_sizes(prediction: Prediction) -> Iterable[RenderableType]:
    for glob, values in prediction.attributes.items():
        sizes = ", ".join(f"{name} = {value}" for name, value in values.items())
        yield f"{glob} sees {sizes} on a rank"
    if prediction.attributes:
        yield ""


def _memory(prediction: Prediction, look: _Look) -> Table:
    table = look.table()
    table.add_column("bytes")
    for name in ("parameters", "gradients", "AdamW", "together"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, memory, shade in (
        ("on each rank", prediction.memory, ""),
        ("unsharded", prediction.unsharded, look.shade("dim")),
    ):
        sizes = (memory.parameters, memory.gradients, memory.optimizer, memory.total)
        table.add_row(name, *map(bytes_text, sizes), style=shade)
    return table


KINDS = ("all_reduce", "all_gather", "reduce_scatter")


def _traffic(prediction: Prediction, look: _Look) -> Iterable[RenderableType]:
    tp = prediction.config.tp
    if tp == 1:
        yield "tp is 1: no TP collectives, every module runs whole."
        return
    table = look.table()
    table.add_column("TP calls, forward + backward", overflow="fold")
    for kind in KINDS:
        table.add_column(look.heading(kind.replace("_", "-")), justify="right", no_wrap=True)
    table.add_column(look.heading("sent per token"), justify="right", no_wrap=True)
    table.add_column(look.heading("gradient sums"), justify="right", no_wrap=True)
    for part in prediction.traffic:
        where = f"{part.where}, each of {part.blocks}" if part.where else "outside of the blocks"
        sent = part.sent_per_token(tp), part.sent_fixed(tp)
        table.add_row(where, *_cells(part.collectives, *sent))
    calls = [call for part in prediction.traffic for call in part.collectives * part.blocks]
    cells = _cells(calls, prediction.sent_per_token(), prediction.sent_fixed())
    table.add_row("whole model", *cells, style=look.shade("bold"))
    yield table
    yield Text(
        "For one micro-batch, nothing recomputed. Sent: by each rank, in a ring. Gradient sums: all-reduces in "
        "backward for whole parameters that see a share of the work; their size does not depend on the tokens.",
        style=look.shade("dim"),
    )


def _gathering(prediction: Prediction) -> Iterable[RenderableType]:
    found = prediction.gathering
    if found is None or prediction.config.parameter_ranks == 1:
        return
    gathers = f"{found.forward_gathers} + {found.backward_gathers} all-gathers"
    blocks = f"{found.kept} block{'s' * (found.kept != 1)}"
    sizes = bytes_text(found.kept_bytes), bytes_text(found.largest_bytes)
    yield ""
    yield (
        f"FSDP2 for one micro-batch: {found.units} units, {gathers}, {found.reduces} reduce-scatters, "
        f"{bytes_text(found.sent)} sent by each rank."
    )
    rest = "some of what lies" if prediction.config.shard_ends else "what lies"
    yield (
        f"{blocks} and {rest} outside of the blocks stay gathered between forward and backward: {sizes[0]}; "
        f"the largest unit takes {sizes[1]}."
    )


def _cells(calls: Sequence[Collective], per_token: float, fixed: float) -> list[str]:
    """Counts of each kind as ``forward + backward``, bytes per token, and the calls of fixed size."""
    counts = Counter((call.kind, call.backward) for call in calls if not call.fixed_bytes)
    sums = sum(1 for call in calls if call.fixed_bytes)
    pairs = [(counts[kind, False], counts[kind, True]) for kind in KINDS]
    return [
        *(f"{forward} + {backward}" if forward or backward else "-" for forward, backward in pairs),
        bytes_text(per_token),
        f"{sums}: {bytes_text(fixed)}" if sums else "-",
    ]


def _percent(share: float) -> str:
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    if share > 0.995:
        return "> 99 %"
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def count_text(number: int) -> str:
    """``8.19 B``, ``621 M``, ``4.1 k``."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 999.5 * size else f"{number / size:.0f} {unit}"
    return str(number)


def bytes_text(number: float) -> str:
    """``5.61 GiB``, ``512 B``; 0 is ``-``."""
    if not number:
        return "-"
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 999.5 * size else f"{number / size:.0f} {unit}"
    return f"{number:.0f} B"
