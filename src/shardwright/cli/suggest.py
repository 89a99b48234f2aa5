"""``shardwright suggest``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from shardwright.cli.sharding import sharding
from shardwright.distributed.config import DTYPES, ParallelConfig


@click.command()
@click.argument("model")
@click.option("--gpus", required=True, type=click.IntRange(1), help="How many, one for each rank.")
@click.option("--gpu", required=True, help="A device, such as h100-80gb, or a YAML file that describes one.")
@click.option("--seq-len", required=True, type=int, help="Tokens of a sequence.")
@click.option("--global-batch", required=True, type=click.IntRange(1), help="Sequences of a step, on all ranks.")
@click.option("--objective", type=click.Choice(["speed", "memory"]), default="speed", show_default=True,
              help="What the first layout is best in.")  # fmt: skip
@click.option("--optimizer", default="adamw", show_default=True, help="As for estimate.")
@click.option("--weights", type=click.Choice(DTYPES), default="float32", show_default=True,
              help="Dtype in which parameters, gradients and the optimizer's state are kept.")  # fmt: skip
@click.option("--lora", default=0, help="Rank of LoRA adapters on all linear layers; the rest is frozen.")
@click.option("--network", default="ib-ndr", show_default=True, help="The fabric between nodes.")
@click.option("--gpus-per-node", type=click.IntRange(1), help="Instead of what is usual for the device.")
@click.option("--save", type=click.Path(path_type=Path), help="Write the first layout as a training file.")
@click.option("--json", "as_json", is_flag=True, help="Print every layout that fits as JSON.")
@sharding(precision="bf16")
def suggest(model: str, config: ParallelConfig, seq_len: int, optimizer: str, **asked: Any) -> None:
    """Search the layouts of MODEL on so many GPUs, and show those that fit, the best first.

    Degrees (tp, cp where sequences are long, ep where there are experts, shards and replicas), sequence parallelism and
    activation checkpointing are searched. Any other setting of a sharding is one that
    every layout has: compile=true loss_tiles=8, for example.
    """
    from shardwright.estimate.suggest_command import run
    from shardwright.estimate.workload import Workload

    run(model, config, Workload(seq_len, optimizer=optimizer), **asked)
