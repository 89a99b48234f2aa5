"""One rank as a process of its own, started by ``launch``: ``python -P -m shardwright.train.worker JOB PARENT``.

torch takes seconds to import. Until then this module needs the standard library and PyYAML only, so that a launcher
that is gone, and an import that hangs, are found from the first moment on.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from shardwright.distributed.config import runs_code
from shardwright.errors import PreemptedError, ShardwrightError, from_system
from shardwright.train.config import JOB_CONFIG, TrainConfig, read_config
from shardwright.train.failure import leave_failure
from shardwright.train.orphan import end_with_parent
from shardwright.train.place import place_from_environment
from shardwright.train.watchdog import Watchdog

REFUSED = 3  # exit code of a rank that raised a ShardwrightError: all that there is to say is in its message


def main(job: Path, parent: int) -> None:
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the launcher is told too, and ends the others
    end_with_parent(parent, job)
    faulthandler.enable()
    config = read_config(job / JOB_CONFIG)
    watchdog = Watchdog.of(config)
    watchdog.begin("importing libraries")
    watchdog.start()

    try:
        _work(config, job, watchdog)
    except Exception as error:  # whatever ends this rank is told by the launcher
        leave_failure(f"{type(error).__name__}: {error}", traceback.format_exc())
        if not isinstance(error, ShardwrightError):
            raise
        with suppress(OSError):
            print(error, file=sys.stderr, flush=True)  # a file, which the launcher reads where nothing could be left
        sys.exit(error.exit_code if isinstance(error, PreemptedError) else REFUSED)


def _work(config: TrainConfig, job: Path, watchdog: Watchdog) -> None:
    try:
        from shardwright.distributed.mesh import make_mesh
        from shardwright.train.meeting import joined
        from shardwright.train.rank import train

        if (
            runs_code(config.sharding.plan) or config.optimizer.runs_code
        ):  # named on the command line, so it may be where that was given
            sys.path.append(os.getcwd())
        place = place_from_environment(os.environ)
        assert place is not None, "torch's launcher sets RANK and its companions"
        with joined(config, place, watchdog) as (_, device):
            train(config, job, make_mesh(config.sharding, device.type), watchdog)
    except ShardwrightError:
        raise
    except Exception as error:
        told = from_system(error)
        if told is None:
            raise
        raise told from error


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
