"""``shardwright estimate``."""

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
@click.option("--batch-size", default=1, show_default=True,
              help="Sequences of a micro-batch, on each data-parallel rank.")  # fmt: skip
@click.option("--accumulation", default=1, show_default=True, help="Micro-batches of a step.")
@click.option("--optimizer", default="adamw", show_default=True,
              help="adamw, adamw_fused, adamw_8bit, adafactor, sgd, sgd_momentum, muon ...")  # fmt: skip
@click.option("--tokens", type=float, help="Of a whole run, to say how long it takes: 15e12, for example.")
@click.option("--price", type=float, help="Dollars of one GPU for an hour.")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write a page about it to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@sharding(precision="bf16")
def estimate(
    asked: Asked,
    config: ParallelConfig,
    seq_len: int,
    batch_size: int,
    accumulation: int,
    optimizer: str,
    **wanted: Any,
) -> None:
    """Say whether training MODEL fits, and what it takes. Needs no GPU and no weights.

    MODEL is a checkpoint folder, a config.json, or a model type of transformers such as qwen3. The sharding is given as
    options or as keys: --tp 8 and tp=8 are the same. Weights are kept in float32 and a step computes in bfloat16 unless
    --weights and --precision say otherwise.
    """
    from shardwright.estimate.estimate_command import run
    from shardwright.estimate.workload import Workload

    run(asked, config, Workload(seq_len, batch_size, accumulation, optimizer), **wanted)
