"""``shardwright launch-check``."""

from __future__ import annotations

import click


@click.command()
@click.argument("arguments", nargs=-1, metavar="[CONFIG] [KEY=VALUE]...")
@click.option("--timeout", default=120.0, show_default=True, type=click.FloatRange(min=0, min_open=True),
              help="Seconds that each part of the check may take: until all ranks are there, for example.")  # fmt: skip
def launch_check(arguments: tuple[str, ...], timeout: float) -> None:
    """Look at the ranks and links that a run would have, before it is started.

    Start it as you would start train: by torchrun, srun, mpirun and the like, or alone, when it starts the ranks
    itself. CONFIG is a training file; without one, keys give the mesh, for example: sharding.tp=8 device=cuda.

    Prints a line for each rank (host, device, place in the mesh, versions), what an all-reduce takes along each axis,
    and what looks wrong. Exit code 1 where something does.
    """
    from shardwright.launch_check.start import start

    start(arguments, timeout)
