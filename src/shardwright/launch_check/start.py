"""From the command line to a check, before torch is imported."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import yaml

from shardwright.settings import apply_overrides, build, read_yaml
from shardwright.train.config import load_config
from shardwright.train.orphan import end_with_parent
from shardwright.train.place import place_from_environment
from shardwright.train.pulse import pulse
from shardwright.train.rank_settings import RankSettings
from shardwright.train.watchdog import Limit, Watchdog

SETTINGS = "settings.yaml"  # of a job folder: what the ranks that were started here check


def start(arguments: Sequence[str], timeout: float) -> None:
    """Check the ranks that a launcher has started, or those that a run of the same settings would start here.

    Args:
        arguments: a training file, if any, and ``KEY=VALUE``.
        timeout: seconds that each part of the check may take.

    Raises:
        ShardwrightError: the settings cannot work, a rank is missing or hangs, or something looks wrong.
    """
    place = place_from_environment(os.environ)
    if place is not None and "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(os.getppid())  # torchrun, which starts every rank itself
    settings = replace(_settings(arguments), step_timeout=timeout, phase_timeout=timeout)
    if place is None:
        from shardwright.launch_check.run import check_local_ranks

        check_local_ranks(settings)
        return
    watchdog = watched(settings)
    watchdog.begin("importing libraries")
    watchdog.start()
    with pulse(watchdog.doing, first=place.rank == 0):
        from shardwright.launch_check.run import check_here

        check_here(settings, place, watchdog)


def watched(settings: RankSettings) -> Watchdog:
    """A watchdog that calls the limit by the name of the option that sets it."""
    limit = Limit(settings.seconds_per_phase, "--timeout")
    return Watchdog(limit, limit)


def _settings(arguments: Sequence[str]) -> RankSettings:
    """Those of a training file, or what the keys say."""
    if arguments and "=" not in arguments[0]:
        return load_config(arguments[0], arguments[1:]).rank_settings
    return build(RankSettings, apply_overrides({}, arguments))


def write(settings: RankSettings, job: Path) -> None:
    """For the ranks that are started here."""
    plain = {one.name: getattr(settings, one.name) for one in fields(settings)}
    (job / SETTINGS).write_text(yaml.safe_dump(plain | {"sharding": settings.sharding.to_dict()}))


def read(job: Path) -> RankSettings:
    """What :func:`write` has written."""
    return build(RankSettings, read_yaml(job / SETTINGS))
