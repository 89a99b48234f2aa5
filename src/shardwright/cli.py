"""The command line. Every command imports what it needs when it is called, so ``shardwright --help`` is instant."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import click

from shardwright import __version__
from shardwright.errors import ShardwrightError

_SECONDS_FOR_RANK_0 = 3


class _Commands(click.Group):
    """A group that turns every :class:`ShardwrightError` into one paragraph on stderr and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ShardwrightError as error:
            tell(error)
            ctx.exit(1)


def tell(error: ShardwrightError) -> None:
    """Print the error, in one rank only: every rank has the same one."""
    from rich.console import Console
    from rich.text import Text

    from shardwright.train.place import place_from_environment

    place = place_from_environment(os.environ)
    if place is not None and place.rank != 0:
        time.sleep(_SECONDS_FOR_RANK_0)  # torchrun stops every rank when the first one ends
        return
    Console(stderr=True).print(Text("Error: ", style="bold red").append(str(error), style="default"), soft_wrap=True)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Run any transformer sharded over many GPUs, and prove that it is the same function."""


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def train(config: Path, overrides: tuple[str, ...]) -> None:
    """Train the model that the YAML file CONFIG describes.

    Any key can be set on the command line too, for example: steps=100 sharding.tp=2 optimizer.lr=1e-4.

    Starts as many local ranks as the config asks for, or uses those that torchrun or srun has started.
    """
    from shardwright.train.config import load_config

    settings = load_config(config, overrides)

    from shardwright.train.launch import run

    run(settings, os.environ)


if __name__ == "__main__":
    main()
