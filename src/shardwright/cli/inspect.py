"""``shardwright inspect``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--no-check", is_flag=True, help="Do not read all files to compare their checksums.")
def inspect(checkpoint: Path, no_check: bool) -> None:
    """Say what is in a training CHECKPOINT (or the newest one of a run's folder), and whether it is whole."""
    from shardwright.checkpoint.run_info import find_checkpoint

    checkpoint = find_checkpoint(checkpoint)  # one that is not there is told without importing torch

    from shardwright.checkpoint.export import inspect as inspect_checkpoint

    click.echo("\n".join(inspect_checkpoint(checkpoint, check=not no_check).lines()))
