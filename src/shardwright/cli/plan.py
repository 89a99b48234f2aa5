"""``shardwright plan``."""

from __future__ import annotations

from pathlib import Path

import click

from shardwright.cli.sharding import sharding
from shardwright.distributed.config import ParallelConfig
from shardwright.distributed.precision import DTYPES


@click.command()
@click.argument("model")
@click.option("--weights", type=click.Choice(DTYPES), default="float32", show_default=True,
              help="Dtype in which parameters, gradients and AdamW's state are kept.")  # fmt: skip
@click.option("--save", type=click.Path(path_type=Path), help="Write the plan to this YAML file: edit, then --plan it.")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write a page about it to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@sharding(tp=2, precision="bf16")
def plan(model: str, config: ParallelConfig, weights: str, save: Path | None, html: Path | None, as_json: bool) -> None:
    """Show how MODEL would be cut, what stays on a rank, and what the ranks would send. Runs and downloads nothing.

    MODEL is a checkpoint folder, a config.json, or a model type of transformers such as qwen3. The sharding is given as
    options or as keys: --tp 8 and tp=8 are the same.
    """
    from shardwright.estimate.command import run

    run(model, config, weights=weights, save=save, html=html, as_json=as_json)
