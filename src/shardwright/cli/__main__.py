"""``python -m shardwright.cli``, where no script is installed."""

from shardwright.cli import main

main(prog_name="shardwright")
