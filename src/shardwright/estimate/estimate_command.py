"""What ``shardwright estimate`` does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from shardwright.distributed.config import ParallelConfig
from shardwright.estimate.asked import Asked
from shardwright.estimate.changes import Change, best_change
from shardwright.estimate.estimating import Estimate, estimate, largest_parts
from shardwright.estimate.timeline import AXES
from shardwright.estimate.trace.tracer import Tracer
from shardwright.estimate.wording import NAMES, answer, gib, subject_line
from shardwright.estimate.workload import Workload


def run(
    asked: Asked,
    config: ParallelConfig,
    workload: Workload,
    *,
    tokens: float | None,
    price: float | None,
    as_json: bool,
    html: Path | None,
) -> None:
    """Estimate and print.

    Raises:
        ShardwrightError: as :func:`shardwright.estimate.estimating.estimate`, or an unknown device.
    """
    machine, reading, tracer = asked.machine(), asked.reading(), Tracer()
    found = estimate(reading, config, workload, machine, gpus=asked.gpus, tracer=tracer)
    found = replace(found, tokens_asked=tokens, price=price)
    change = best_change(found, reading, tracer)
    if html is not None:
        from shardwright.estimate.page.pages import estimate_page

        html.write_text(estimate_page(found, change), encoding="utf-8")
    if as_json:
        told = found.to_dict() | {"change": None if change is None else change.to_dict()}
        click.echo(json.dumps(told, indent=2))
        return
    print_estimate(found, change, Console())


def print_estimate(found: Estimate, change: Change | None, console: Console) -> None:
    """The answer first, then what it is made of."""
    for line in answer(found, change):
        console.print(line, highlight=False)
    console.print(subject_line(found), style="dim", highlight=False)
    print_memory(found, console)
    print_speed(found, console)
    if found.why_formula:
        console.print(
            "[yellow]The activations come from a formula, which is off by up to 60 %[/]: the model's code cannot be "
            f"run on tensors without values ({found.why_formula})."
        )


def print_memory(found: Estimate, console: Console) -> None:
    """What takes the memory at the peak."""
    at = found.peak
    table = Table(title=f"Memory of a rank at its peak: {at.phase} of {at.where or 'what is outside of the blocks'}")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    for name, size in largest_parts(at.parts):
        table.add_row(NAMES[name], gib(size))
    table.add_row("tensors together", gib(at.total), style="bold", end_section=True)
    table.add_row("allowance: context and workspaces", gib(found.overheads.context))
    table.add_row("allowance: communicators", gib(found.overheads.communicators))
    table.add_row("allowance: fragmentation, 5 % of the tensors", gib(found.overheads.fragmentation))
    console.print(table)


def print_speed(found: Estimate, console: Console) -> None:
    """What the time of a step is spent on."""
    speed = found.speed
    table = Table(title="A step")
    table.add_column("part")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    parts = {
        "computation": speed.compute,
        **{f"collectives of {AXES[axis]}": seconds for axis, seconds in speed.collectives.items() if seconds},
        "waiting for gathers and reductions of FSDP2": speed.exposed,
        "clipping and optimizer": speed.optimizer,
    }
    for name, seconds in parts.items():
        table.add_row(name, f"{seconds:.4f}", f"{seconds / speed.step:.1%}")
    table.add_row("gathers and reductions beside computation", f"{speed.hidden:.4f}", "hidden", style="dim")
    console.print(table)
    if found.days is not None:
        cost = "" if found.dollars is None else f" and about {found.dollars:,.0f} dollars"
        console.print(f"{found.tokens_asked:,.0f} tokens take about {found.days:,.1f} days{cost}.")
