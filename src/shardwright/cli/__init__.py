"""The command line, a file per command. A command imports what it needs when it is called: ``--help`` is instant."""

from __future__ import annotations

import click

from shardwright import __version__
from shardwright.cli.calibrate import calibrate
from shardwright.cli.demo import demo
from shardwright.cli.estimate import estimate
from shardwright.cli.export import export
from shardwright.cli.group import Commands
from shardwright.cli.inspect import inspect
from shardwright.cli.launch_check import launch_check
from shardwright.cli.plan import plan
from shardwright.cli.suggest import suggest
from shardwright.cli.train import train
from shardwright.cli.verify import verify

__all__ = ["main"]


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Run any transformer sharded over many GPUs, and prove that it is the same function."""


for command in (demo, plan, estimate, suggest, calibrate, verify, launch_check, train, export, inspect):
    main.add_command(command)
