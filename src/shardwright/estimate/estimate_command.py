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
from shardwright.estimate.estimating import Estimate, estimate, largest_parts
from shardwright.estimate.timeline import AXES
from shardwright.estimate.workload import Workload

NAMES = {
    "parameters": "parameters",
    "optimizer": "optimizer state",
    "gradients": "gradients",
    "gathered": "gathered parameters (FSDP2)",
    "buffers": "buffers of gathers and reductions",
    "unreduced": "gradients not reduced yet",
    "activations": "activations kept for backward",
    "working": "of the code that runs at that moment",
}


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
    machine = asked.machine()
    found = estimate(asked.reading(), config, workload, machine, gpus=asked.gpus)
    found = replace(found, tokens_asked=tokens, price=price)
    if html is not None:
        from shardwright.estimate.page import page

        html.write_text(page(found))
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
        return
    print_estimate(found, Console())


def print_estimate(found: Estimate, console: Console) -> None:
    """The answer first, then what it is made of."""
    device, at = found.machine.device, found.peak
    word = "[bold green]Fits[/]" if found.fits else "[bold red]Does not fit[/]"
    left = f"{gib(found.free)} GiB free" if found.fits else f"{gib(-found.free)} GiB too much"
    console.print(f"{word}: {gib(found.memory)} of {gib(device.memory)} GiB on each {device.name}, {left}.")
    console.print(
        f"{found.model}, {found.parameters / 1e9:.2f} billion parameters, on {found.config.least_world_size} ranks: "
        f"{layout_of(found.config)}; {found.workload.batch_size} x {found.workload.seq_len} tokens a micro-batch"
        + (f", {found.workload.accumulation} a step" if found.workload.accumulation > 1 else "")
        + f"; {found.workload.optimizer}."
    )
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
    print_speed(found, console)
    if found.why_formula:
        console.print(
            "[yellow]The activations come from a formula, which is off by up to 60 %[/]: the model's code cannot be "
            f"run on tensors without values ({found.why_formula})."
        )


def print_speed(found: Estimate, console: Console) -> None:
    """How long a step takes, and what it waits for."""
    speed = found.speed
    console.print(
        f"A step takes about [bold]{speed.step:.3g} s[/]: {speed.tokens_per_second:,.0f} tokens/s on each GPU, "
        f"MFU {speed.mfu:.1%}."
    )
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
    name, share = speed.waits_for
    console.print(f"Beside computation it waits for {name} most: {share:.1%} of a step.")
    if found.days is not None:
        cost = "" if found.dollars is None else f" and about {found.dollars:,.0f} dollars"
        console.print(f"{found.tokens_asked:,.0f} tokens take about {found.days:,.1f} days{cost}.")


_DEGREES = ("dp_replicate", "dp_shard", "cp", "tp", "ep")


def layout_of(config: ParallelConfig) -> str:
    """The degrees above one, and the settings that are not the usual ones."""
    usual, values = ParallelConfig().to_dict(), config.to_dict()
    degrees = [f"{name} {values[name]}" for name in _DEGREES if values[name] > 1]
    others = [
        f"{key}={value}" for key, value in values.items() if value != usual[key] and key not in (*_DEGREES, "precision")
    ]
    return ", ".join([*degrees, *others]) or "one rank"


def gib(size: float) -> str:
    """Bytes in GiB, as text."""
    return f"{size / 2**30:.2f}"
