"""``shardwright verify``."""

from __future__ import annotations

import click

from shardwright.cli.sharding import sharding
from shardwright.distributed.config import ParallelConfig


@click.command()
@click.argument("model")
@click.option("--accumulate", default=1, show_default=True, help="Micro-batches per data-parallel rank.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
              help="What both sides compute on; ranks share GPUs where there are fewer.")  # fmt: skip
@sharding()
def verify(model: str, config: ParallelConfig, accumulate: int, as_json: bool, device: str) -> None:
    """Prove that MODEL, sharded, computes what it computes in one process. Exit code 0 only if it is exact.

    MODEL is a checkpoint folder, a config.json, or a model type of transformers such as qwen3. A tiny copy of it is
    trained for one step on ranks of this machine (on the CPU, whatever GPUs there are, unless --device or --engine says
    otherwise); no weights are read or downloaded. The sharding is given as options or as keys: --tp 2 and tp=2 are the
    same.
    """
    from shardwright.verify.cli import verify_command

    raise SystemExit(verify_command(model, config, accumulate, as_json, device))
