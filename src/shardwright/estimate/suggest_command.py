"""What ``shardwright suggest`` does."""

from __future__ import annotations

import json
from pathlib import Path

import click
import yaml
from rich.console import Console
from rich.table import Table

from shardwright.distributed.config import ParallelConfig
from shardwright.errors import ConfigError
from shardwright.estimate.estimate_command import gib, layout_of
from shardwright.estimate.estimating import Estimate, read_model
from shardwright.estimate.hardware import load_machine
from shardwright.estimate.search import Search, search
from shardwright.estimate.workload import Workload

SHOWN = 10


def run(
    model: str, base: ParallelConfig, workload: Workload, *, gpus: int, gpu: str, global_batch: int, objective: str,
    weights: str, lora: int, network: str, gpus_per_node: int | None, save: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Search, print, and save the best.

    Raises:
        ShardwrightError: as :func:`shardwright.estimate.search.search`, or ``save`` exists.
    """
    if save is not None and save.exists():
        raise ConfigError(f"{save} exists. Choose another name for --save, or remove it first.")
    machine = load_machine(gpu, network=network, gpus_per_node=gpus_per_node)
    reading = read_model(model, weights, lora)
    found = search(reading, workload, machine, gpus=gpus, global_batch=global_batch, objective=objective, base=base)
    if as_json:
        click.echo(json.dumps([made.to_dict() for made in found.fitting], indent=2))
    else:
        print_search(found, Console())
    if save is not None and found.fitting:
        save.write_text(training_file(model, found.fitting[0], global_batch))
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
        console.print(
            f"[bold green]{layout_of(best.config)}[/], {best.workload.batch_size} sequences a micro-batch, "
            f"{best.workload.accumulation} a step: {best.speed.tokens_per_second:,.0f} tokens/s on each GPU, "
            f"{gib(best.memory)} of {gib(best.machine.device.memory)} GiB."
        )
        console.print(_table(found.fitting[:SHOWN]))
    console.print(f"{len(found.fitting)} layouts fit, {found.too_large} do not.")
    for reason, count in found.refused.items():
        console.print(f"{count} not possible: {reason}.")


_SHORT = {
    "collectives of tensor parallelism": "TP",
    "collectives of context parallelism": "CP",
    "collectives of expert parallelism": "EP",
    "gathers and reductions of FSDP2": "FSDP2",
    "the optimizer": "optimizer",
}


def _table(fitting: list[Estimate]) -> Table:
    table = Table(title="Layouts that fit: replicas x shards x cp x tp, ep among them; micro-batch x accumulation")
    for name in ("ranks", "recomputed", "batch", "tokens/s", "MFU", "GiB", "waits", "against the first"):
        table.add_column(name, justify="right" if name in ("tokens/s", "MFU", "GiB") else "left", no_wrap=True)
    best = fitting[0]
    for made in fitting:
        waits, share = made.speed.waits_for
        config, work = made.config, made.workload
        table.add_row(
            _ranks(config), config.activation_checkpointing,
            f"{work.batch_size} x {work.accumulation}", f"{made.speed.tokens_per_second:,.0f}",
            f"{made.speed.mfu:.1%}", gib(made.memory), f"{_SHORT[waits]} {share:.0%}", against(made, best),
        )  # fmt: skip
    return table


def _ranks(config: ParallelConfig) -> str:
    degrees = f"{config.dp_replicate} x {config.dp_shard} x {config.cp} x {config.tp}"
    return degrees if config.ep == 1 else f"{degrees}, ep {config.ep}"


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
