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
from shardwright.estimate.estimate_command import gib, layout_of
from shardwright.estimate.estimating import Estimate
from shardwright.estimate.search import Search, search
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
    """The best layouts, why each is where it is, and what was left out."""
    if not found.fitting:
        nearest = found.nearest
        console.print("[bold red]No layout fits.[/]")
        if nearest is not None:
            console.print(
                f"The nearest, {layout_of(nearest.config)}, needs {gib(nearest.memory)} GiB of "
                f"{gib(nearest.machine.device.memory)}. Take more GPUs, shorter sequences, loss_tiles=8, or another "
                "optimizer."
            )
    else:
        best = found.fitting[0]
        waits, share = best.speed.waits_for
        console.print(
            f"[bold green]{layout_of(best.config)}[/], {best.workload.batch_size} sequences a micro-batch, "
            f"{best.workload.accumulation} a step: {best.speed.tokens_per_second:,.0f} tokens/s on each GPU, "
            f"{gib(best.memory)} of {gib(best.machine.device.memory)} GiB. Beside computation it waits for "
            f"{waits} most: {share:.1%} of a step."
        )
        console.print(_table(found.fitting[:SHOWN]))
    console.print(f"{len(found.fitting)} layouts fit, {found.too_large} do not.")
    for reason, count in found.refused.items():
        console.print(f"{count} not possible: {reason}.")


_SHORT = {"dp_replicate": "replicas", "dp_shard": "shards", "cp": "cp", "tp": "tp", "ep": "ep"}


def _table(fitting: list[Estimate]) -> Table:
    """Readable in 80 columns."""
    table = Table(
        title="Layouts that fit; batch: sequences a micro-batch x accumulation",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("ranks", min_width=14, overflow="fold")
    for name in ("recomputed", "batch"):
        table.add_column(name, no_wrap=True)
    for name in ("tokens/s", "MFU", "GiB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("against the first", min_width=18, overflow="fold")
    best = fitting[0]
    for made in fitting:
        config, work = made.config, made.workload
        table.add_row(
            _ranks(config), config.activation_checkpointing,
            f"{work.batch_size} x {work.accumulation}", f"{made.speed.tokens_per_second:,.0f}",
            f"{made.speed.mfu:.1%}", f"{made.memory / 2**30:.1f}", against(made, best),
        )  # fmt: skip
    return table


def _ranks(config: ParallelConfig) -> str:
    degrees = config.to_dict()
    return ", ".join(f"{short} {degrees[name]}" for name, short in _SHORT.items() if degrees[name] > 1) or "one"


def against(made: Estimate, best: Estimate) -> str:
    """What costs a layout its place: the part of a step that is longer by most."""
    if made is best:
        return "the first"
    parts = {
        "compute": made.speed.compute - best.speed.compute,
        "collectives": sum(made.speed.collectives.values()) - sum(best.speed.collectives.values()),
        "FSDP2": made.speed.exposed - best.speed.exposed,
        "optimizer": made.speed.optimizer - best.speed.optimizer,
    }
    name = max(parts, key=lambda key: parts[key])
    if parts[name] <= 0:
        return f"{made.speed.step - best.speed.step:+.2g} s"
    return f"+{parts[name]:.2g} s {name}"
