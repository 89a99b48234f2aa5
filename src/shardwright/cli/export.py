"""``shardwright export``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--trust-remote-code", is_flag=True, help="Run the model's own code, which is in the checkpoint.")
@click.option("--overwrite", is_flag=True, help="Replace in OUT what Shardwright wrote there; all else stays.")
def export(checkpoint: Path, out: Path, trust_remote_code: bool, overwrite: bool) -> None:
    """Turn a training CHECKPOINT (or the newest of a run's folder) into a Hugging Face folder OUT. Needs no GPU."""
    from shardwright.checkpoint.run_info import find_checkpoint

    checkpoint = find_checkpoint(checkpoint)  # one that is not there is told without importing torch

    from shardwright.checkpoint.export import export as export_checkpoint

    export_checkpoint(checkpoint, out, trust_remote_code, overwrite)
