"""What ``shardwright estimate`` does."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import click
import yaml
from rich.console import Console
from rich.table import Table

from shardwright.distributed.config import ParallelConfig
from shardwright.errors import ConfigError
from shardwright.estimate.estimating import Estimate, estimate, largest_parts, read_model
from shardwright.estimate.hardware import load_machine
from shardwright.estimate.workload import Workload

_NAMES = {
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
    model: str, config: ParallelConfig, workload: Workload, *, gpus: int, gpu: str, weights: str, lora: int,
    network: str, gpus_per_node: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Estimate and print.

    Raises:
        ShardwrightError: as :func:`shardwright.estimate.estimating.estimate`, or an unknown device.
    """
    machine = load_machine(gpu, network=network, gpus_per_node=gpus_per_node)
    found = estimate(read_model(model, weights, lora), config, workload, machine, gpus=gpus)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
        return
    print_estimate(found, Console())


def parse_layout(overrides: Iterable[str], defaults: dict[str, Any]) -> ParallelConfig:
    """A config from KEY=VALUE words.

    Raises:
        ConfigError: a word of another form, or a key or value that a ParallelConfig does not take.
    """
    values = dict(defaults)
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"{word!r} must be KEY=VALUE, for example tp=8 or activation_checkpointing=full.")
        values[key.removeprefix("sharding.")] = yaml.safe_load(text)
    return ParallelConfig.from_dict(values)


def print_estimate(found: Estimate, console: Console) -> None:
    """The answer first, then what it is made of."""
    device, at = found.machine.device, found.peak
    word = "[bold green]Fits[/]" if found.fits else "[bold red]Does not fit[/]"
    left = f"{_gib(found.free)} GiB free" if found.fits else f"{_gib(-found.free)} GiB too much"
    console.print(f"{word}: {_gib(found.memory)} of {_gib(device.memory)} GiB on each {device.name}, {left}.")
    console.print(
        f"{found.model}, {found.parameters / 1e9:.2f} billion parameters, on {found.config.least_world_size} ranks: "
        f"{_layout(found.config)}; {found.workload.batch_size} x {found.workload.seq_len} tokens a micro-batch"
        + (f", {found.workload.accumulation} a step" if found.workload.accumulation > 1 else "")
        + f"; {found.workload.optimizer}."
    )
    table = Table(title=f"Memory of a rank at its peak: {at.phase} of {at.where or 'what is outside of the blocks'}")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    for name, size in largest_parts(at.parts):
        table.add_row(_NAMES[name], _gib(size))
    table.add_row("tensors together", _gib(at.total), style="bold", end_section=True)
    table.add_row("allowance: context and workspaces", _gib(found.overheads.context))
    table.add_row("allowance: communicators", _gib(found.overheads.communicators))
    table.add_row("allowance: fragmentation, 5 % of the tensors", _gib(found.overheads.fragmentation))
    console.print(table)
    if found.why_formula:
        console.print(
            "[yellow]The activations come from a formula, which is off by up to 60 %[/]: the model's code cannot be "
            f"run on tensors without values ({found.why_formula})."
        )


_DEGREES = ("dp_replicate", "dp_shard", "cp", "tp")


def _layout(config: ParallelConfig) -> str:
    usual, values = ParallelConfig().to_dict(), config.to_dict()
    degrees = [f"{name} {values[name]}" for name in _DEGREES if values[name] > 1]
    others = [
        f"{key}={value}" for key, value in values.items() if value != usual[key] and key not in (*_DEGREES, "precision")
    ]
    return ", ".join([*degrees, *others]) or "one rank"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"
