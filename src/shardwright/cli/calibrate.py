"""``shardwright calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command()
@click.option("--output", required=True, type=click.Path(path_type=Path), help="The YAML file of a device to write.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--ranks", type=click.IntRange(1), help="Processes that talk to each other. Default: one for every GPU.")
@click.option("--like", help="A known device, such as h100-80gb, whose datasheet has the peaks.")
@click.option("--fabric", help="What joins the devices, where there is one rank, so that it is not measured.")
def calibrate(output: Path, **wanted: Any) -> None:
    """Measure this machine, and write a file that estimate and suggest take as --gpu.

    Matrix products by shape, attention, memory, the launch of a kernel; with several ranks, collectives. Nothing else
    should run beside it.
    """
    from shardwright.estimate.calibrate.command import run

    run(output, **wanted)
