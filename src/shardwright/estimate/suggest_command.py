"""What ``shardwright suggest`` does."""

from __future__ import annotations

import json
from pathlib import Path

import click
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from shardwright.distributed.config import ParallelConfig
from shardwright.errors import ConfigError
from shardwright.estimate.asked import Asked
from shardwright.estimate.estimating import Estimate
from shardwright.estimate.search import Search, search
from shardwright.estimate.wording import gib, layout_of, next_better, table_rows
from shardwright.estimate.workload import Workload

SHOWN = 10


def run(
    asked: Asked,
    base: ParallelConfig,
    workload: Workload,
    *,
    global_batch: int,
    objective: str,
    save: Path | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Search, print, and save the best.

    Raises:
        ShardwrightError: as :func:`shardwright.estimate.search.search`, or ``save`` exists.
    """
    if save is not None and save.exists():
        raise ConfigError(f"{save} exists. Choose another name for --save, or remove it first.")
    machine, reading = asked.machine(), asked.reading()
    found = search(
        reading, workload, machine, gpus=asked.gpus, global_batch=global_batch, objective=objective, base=base
    )
    if html is not None:
        from shardwright.estimate.page.pages import suggest_page

        html.write_text(suggest_page(found), encoding="utf-8")
    if as_json:
        click.echo(json.dumps([made.to_dict() for made in found.fitting], indent=2))
    else:
        print_search(found, Console())
    if save is not None and found.fitting:
        save.write_text(training_file(asked.model, found.fitting[0], global_batch))
        if not as_json:
            click.echo(f"The first one is saved to {save}: add data.paths, then shardwright train {save}.")


def training_file(model: str, best: Estimate, global_batch: int) -> str:
    """A training file of the layout, without the text to train on."""
    usual, chosen = ParallelConfig().to_dict(), best.config.to_dict()
    path = Path(model)
    held = {"path": model} if (path / "model.safetensors.index.json").exists() else {"config": model}
    return yaml.safe_dump(
        {
            "model": held,
            "data": {"paths": [], "sequence_length": best.workload.seq_len},
            "sharding": {key: value for key, value in chosen.items() if value != usual[key]},
            "batch_size": global_batch,
            "accumulation": best.workload.accumulation,
        },
        sort_keys=False,
    )


def print_search(found: Search, console: Console) -> None:
    """The best layouts, why each is where it is, what the next better one lacks, and what was left out."""
    if not found.fitting:
        nearest = found.nearest
        console.print("[bold red]No layout fits.[/]")
        if nearest is not None:
            console.print(
                f"The nearest, {layout_of(nearest.config)}, needs {gib(nearest.memory)} GiB of "
                f"{gib(nearest.machine.device.memory)}. Take more GPUs, shorter sequences, loss_tiles=8, or another "
                "optimizer.", highlight=False,
            )  # fmt: skip
    else:
        for line in _first(found.fitting[0]):
            console.print(line, highlight=False)
        if found.next_better is not None:
            console.print(next_better(found.next_better, found.fitting[0], found.objective), highlight=False)
        console.print(_table(found.fitting[:SHOWN], found.objective))
    left = f", and {found.left_out} were not looked at, since they need more" if found.left_out else ""
    console.print(f"{len(found.fitting)} layouts fit, {len(found.too_large)} do not{left}.", highlight=False)
    for reason, count in found.refused.items():
        console.print(f"{count} not possible: {reason}.", highlight=False)


def _first(best: Estimate) -> list[str]:
    waits, share = best.speed.waits_for
    device = best.machine.device
    return [
        f"[bold green]Yes, {layout_of(best.config)} fits[/]: {gib(best.memory)} of {gib(device.memory)} GiB on each of "
        f"{best.config.least_world_size} {device.name}, {gib(best.free)} GiB free.",
        f"{best.workload.batch_size} sequences a micro-batch, {best.workload.accumulation} a step: "
        f"{best.speed.step:.3g} s, {best.speed.tokens_per_second:,.0f} tokens/s on each GPU, MFU {best.speed.mfu:.1%}. "
        f"Beside computation it waits for {waits} most: {share:.1%} of a step.",
    ]


def _table(fitting: list[Estimate], objective: str) -> Table:
    """Readable in 80 columns."""
    table = Table(
        title="Layouts that fit; batch: sequences a micro-batch x accumulation",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    cost = objective == "cost"
    table.add_column("ranks", min_width=14, overflow="fold")
    for name in ("recomputed", "batch"):
        table.add_column(name, no_wrap=True)
    for name in ("tokens/s", "GPU hours" if cost else "MFU", "GiB"):
        table.add_column(name, justify="right", no_wrap=not cost)
    table.add_column("against the first", min_width=18, overflow="fold")
    for made, (ranks, recomputed, batch, place, tokens, mfu, size) in zip(fitting, table_rows(fitting), strict=True):
        hours = f"{1e9 / made.speed.tokens_per_second / 3600:.3g}"
        table.add_row(ranks, recomputed, batch, tokens, hours if cost else mfu, size, place)
    if cost:
        table.caption = "GPU hours: of a billion tokens"
    return table
