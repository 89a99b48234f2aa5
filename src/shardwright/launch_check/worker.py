"""One rank of a check as a process of its own: ``python -P -m shardwright.launch_check.worker JOB PARENT``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from shardwright.launch_check.start import read, watched
from shardwright.train.as_rank import begin, reporting
from shardwright.train.place import place_from_environment


def main(job: Path, parent: int) -> None:
    begin(job, parent)
    settings = read(job)
    watchdog = watched(settings)
    with reporting(watchdog):
        from shardwright.launch_check.run import check_here

        place = place_from_environment(os.environ)
        assert place is not None, "torch's launcher sets RANK and its companions"
        check_here(settings, place, watchdog)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
