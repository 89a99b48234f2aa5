"""A check, from the first rank to the verdict."""

from __future__ import annotations

import os
import time

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import SignalException

from shardwright.distributed.mesh import make_mesh
from shardwright.errors import RunError
from shardwright.launch_check import facts, measure
from shardwright.launch_check.findings import findings
from shardwright.launch_check.report import axis_lines, rank_lines
from shardwright.launch_check.start import write
from shardwright.scratch import scratch_folder
from shardwright.train.local_ranks import check_machine, local_ranks, start_ranks
from shardwright.train.meeting import joined
from shardwright.train.place import Place
from shardwright.train.rank_settings import RankSettings
from shardwright.train.watchdog import Watchdog


def check_local_ranks(settings: RankSettings) -> None:
    """Check the ranks that a run of these settings would start on this machine.

    Raises:
        ShardwrightError: as :func:`check_here`, once.
    """
    ranks = local_ranks(settings)
    settings.sharding.degrees(ranks)  # what does not fit is told before there are ranks
    check_machine(settings, ranks)
    with scratch_folder() as job:
        write(settings, job)
        try:
            start_ranks(ranks, job, "shardwright.launch_check.worker")
        except SignalException as error:
            raise RunError(f"Stopped by {error.sigval.name}; all {ranks} ranks have ended.") from None


def check_here(settings: RankSettings, place: Place, watchdog: Watchdog) -> None:
    """The check as one of its ranks. Rank 0 prints it.

    Raises:
        ConfigError: the degrees do not fit the ranks, or there are fewer GPUs than ranks.
        RunError: something looks wrong; on every rank.
    """
    settings.sharding.degrees(place.world_size)
    came = time.time()
    _say(place.rank, f"Waiting for {place.world_size} rank{'s' * (place.world_size > 1)} ...")
    with joined(settings, place, watchdog) as (_, device):
        watchdog.begin("making the mesh")
        mesh = make_mesh(settings.sharding, device.type)
        axes = facts.axes_of(mesh, settings.sharding.ep)
        _say(place.rank, "All are here. Measuring ...")
        watchdog.begin("comparing clocks")
        ahead = measure.seconds_ahead()
        watchdog.begin("multiplying matrices")
        work = measure.work(device)
        measured = {}
        for name, one in axes.items():
            watchdog.begin(f"measuring an all-reduce along {name}")
            measured[name] = measure.all_reduces(one, device)
        watchdog.begin("gathering what the ranks have found")
        mine = facts.RankFacts(
            rank=place.rank,
            host=facts.host(),
            device=facts.describe(device),
            kind=device.type,
            versions=facts.versions(device.type),
            coordinates={name: one.get_local_rank() for name, one in axes.items()},
            groups=facts.groups_of(axes),
            settings=facts.settings(os.environ),
            came=came,
            ahead=ahead,
            work=work,
            measured=measured,
        )
        _conclude(mine)


def _conclude(mine: facts.RankFacts) -> None:
    everyone: list[facts.RankFacts] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found = findings(everyone)
    _say(mine.rank, "", *rank_lines(everyone), "", *axis_lines(everyone), "")
    if not found:
        _say(mine.rank, "Nothing looks wrong.")
        return
    _say(mine.rank, *(f"{number}. {text}" for number, text in enumerate(found, 1)))
    raise RunError(f"{len(found)} thing{'s look' if len(found) > 1 else ' looks'} wrong, as listed above.")


def _say(rank: int, *lines: str) -> None:
    if rank == 0:
        print(*lines, sep="\n", flush=True)
