"""What a rank that :func:`shardwright.train.local_ranks.start_ranks` has started does first and last.

torch takes seconds to import. Until then a rank needs the standard library and PyYAML only, so that a launcher that is
gone, and an import that hangs, are found from the first moment on.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shardwright.errors import PreemptedError, ShardwrightError, from_system
from shardwright.train.failure import leave_failure
from shardwright.train.orphan import end_with_parent
from shardwright.train.pulse import pulse
from shardwright.train.watchdog import Watchdog

REFUSED = 3  # exit code of a rank that raised a ShardwrightError: all that there is to say is in its message


def begin(job: Path, parent: int) -> None:
    """End with the launcher, the process ``parent``, and when it says so."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the launcher is told too, and ends the others
    end_with_parent(parent, job)
    faulthandler.enable()


@contextmanager
def reporting(watchdog: Watchdog) -> Iterator[None]:
    """Watch what is inside, which imports torch, and leave an error that ends it where the launcher finds it."""
    watchdog.begin("importing libraries")
    watchdog.start()
    try:
        with pulse(watchdog.doing, first=os.environ.get("RANK") == "0"), _system_told():
            yield
    except Exception as error:  # whatever ends this rank is told by the launcher
        leave_failure(f"{type(error).__name__}: {error}", traceback.format_exc())
        if not isinstance(error, ShardwrightError):
            raise
        with suppress(OSError):
            print(error, file=sys.stderr, flush=True)  # a file, which the launcher reads where nothing could be left
        sys.exit(error.exit_code if isinstance(error, PreemptedError) else REFUSED)


@contextmanager
def _system_told() -> Iterator[None]:
    """Inside, what the system refuses is raised as one of our errors."""
    try:
        yield
    except ShardwrightError:
        raise
    except Exception as error:
        told = from_system(error)
        if told is None:
            raise
        raise told from error
