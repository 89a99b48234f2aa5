"""From the command line to a run, before torch is imported: in the seconds that takes, a rank can lose its launcher."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from shardwright.train.config import load_config
from shardwright.train.find import check_paths
from shardwright.train.orphan import end_with_parent
from shardwright.train.output import check_output
from shardwright.train.place import place_from_environment
from shardwright.train.pulse import pulse
from shardwright.train.watchdog import Watchdog


def start(config: Path, overrides: Sequence[str]) -> None:
    """The run that the file ``config`` describes: on local ranks that it starts, or as one of those a launcher started.

    Raises:
        ShardwrightError: one paragraph, whichever rank it came from.
    """
    place = place_from_environment(os.environ)
    if place is not None and "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(os.getppid())  # torchrun, which starts every rank itself
    settings = load_config(config, overrides)
    settings.let_code_be_found()
    ranks = settings.rank_settings.known_ranks if place is None else place.world_size
    if ranks is not None:  # what can be told without torch is told at once
        settings.check_ranks(ranks)
    settings.check_folders()
    check_paths(settings.data)
    check_output(settings.output, settings.checkpoint.resume)
    watchdog = Watchdog.of(settings.rank_settings)
    watchdog.begin("importing libraries")
    if place is None:
        with pulse(watchdog.doing):
            from shardwright.train.launch import run_on_local_ranks

        run_on_local_ranks(settings)
        return
    watchdog.start()
    with pulse(watchdog.doing, first=place.rank == 0):
        from shardwright.train.launch import run_here

        run_here(settings, place, watchdog)
