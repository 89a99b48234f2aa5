"""One rank of a run as a process of its own: ``python -P -m shardwright.train.worker JOB PARENT``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from shardwright.train.as_rank import begin, reporting
from shardwright.train.config import JOB_CONFIG, TrainConfig, read_config
from shardwright.train.place import place_from_environment
from shardwright.train.watchdog import Watchdog


def main(job: Path, parent: int) -> None:
    begin(job, parent)
    config = read_config(job / JOB_CONFIG)
    watchdog = Watchdog.of(config.rank_settings)
    with reporting(watchdog):
        _work(config, job, watchdog)


def _work(config: TrainConfig, job: Path, watchdog: Watchdog) -> None:
    from shardwright.distributed.mesh import make_mesh
    from shardwright.train.meeting import joined
    from shardwright.train.rank import train

    config.let_code_be_found()
    place = place_from_environment(os.environ)
    assert place is not None, "torch's launcher sets RANK and its companions"
    with joined(config.rank_settings, place, watchdog) as (_, device):
        train(config, job, make_mesh(config.sharding, device.type), watchdog)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
