"""``shardwright demo``."""

from __future__ import annotations

import click


@click.command()
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def demo(overrides: tuple[str, ...]) -> None:
    """Train a small Llama on four ranks of this machine, in about two minutes on two free CPU cores.

    Writes runs/quickstart.yaml, a training file, and trains as it says, on the source of Python's own asyncio. The
    first step is compared with one process, and plain transformers reads the saved model. KEY=VALUE is as for train.
    """
    from shardwright.demo.run import run

    run(overrides)
