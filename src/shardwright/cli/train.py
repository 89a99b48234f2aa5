"""``shardwright train``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def train(config: Path, overrides: tuple[str, ...]) -> None:
    """Train the model that the YAML file CONFIG describes.

    Any key can be set on the command line too, for example: steps=100 sharding.tp=2 optimizer.lr=1e-4.

    Starts as many local ranks as the config asks for, or uses those that torchrun or srun has started.
    """
    from shardwright.train.start import start

    start(config, overrides)
