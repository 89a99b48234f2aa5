"""A rank as ``shardwright.train.worker`` is one, which trains nothing and so starts in a fraction of a second.

It begins and reports as that does; what it then does is in the file ``what`` of the folder where it was started.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from shardwright.errors import ParityError
from shardwright.train.as_rank import begin, reporting
from shardwright.train.watchdog import Limit, Watchdog


def main() -> None:
    begin(Path(sys.argv[1]), int(sys.argv[2]))
    limit = Limit(1000.0, "phase_timeout")
    with reporting(Watchdog(limit, limit)):
        Path(f"rank-{os.environ['RANK']}").write_text(str(os.getpid()))
        what, other = Path("what").read_text(), Path(f"rank-{1 - int(os.environ['RANK'])}")
        while not other.exists() or not other.read_text():
            time.sleep(0.01)
        if what == "refuse":
            raise ParityError("The first step differs: by 2")
        if what == "rank 1 dies" and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1000)  # as in a collective that waits for the other


if __name__ == "__main__":
    main()
