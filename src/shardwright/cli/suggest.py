"""``shardwright suggest``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardwright.cli.asked import about_model_and_gpus
from shardwright.cli.sharding import sharding
from shardwright.distributed.config import ParallelConfig

if TYPE_CHECKING:
    from shardwright.estimate.asked import Asked


@click.command()
@about_model_and_gpus
@click.option("--seq-len", required=True, type=int, help="Tokens of a sequence.")
@click.option("--global-batch", required=True, type=click.IntRange(1), help="Sequences of a step, on all ranks.")
@click.option("--objective", type=click.Choice(["speed", "memory", "cost"]), default="speed", show_default=True,
              help="What the first layout is best in. cost: GPU hours per token, on at most so many GPUs.")  # fmt: skip
@click.option("--optimizer", default="adamw", show_default=True, help="As for estimate.")
@click.option("--save", type=click.Path(path_type=Path), help="Write the first layout as a training file.")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write a page about it to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print every layout that fits as JSON.")
@sharding(precision="bf16")
def suggest(asked: Asked, config: ParallelConfig, seq_len: int, optimizer: str, **wanted: Any) -> None:
    """Search the layouts of MODEL on so many GPUs, and show those that fit, the best first.

    Degrees (tp, cp where sequences are long, ep where there are experts, shards and replicas), sequence parallelism,
    activation checkpointing, resharding after forward, micro-batches and accumulation are searched. Any other setting
    of a sharding is one that every layout has: compile=true loss_tiles=8, for example.
    """
    from shardwright.estimate.suggest_command import run
    from shardwright.estimate.workload import Workload

    run(asked, config, Workload(seq_len, optimizer=optimizer), **wanted)
