"""One rank as a process of its own: ``python -m shardwright.train.worker JOB_FOLDER``, started by ``launch``."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from shardwright.distributed.mesh import make_mesh
from shardwright.errors import PreemptedError, ShardwrightError
from shardwright.train.config import load_config
from shardwright.train.place import place_from_environment
from shardwright.train.prepare import CONFIG
from shardwright.train.rank import device_of, process_group, train

REFUSED = 3  # exit code of a rank that raised a ShardwrightError: all that there is to say is in its message


def end_with_parent() -> None:
    """End this process when the one that started it is gone, even if that was killed and could not end its ranks."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(REFUSED)  # at once: nobody is left to tell, and a collective may never come back

    threading.Thread(target=watch, daemon=True).start()


@record  # leaves the error where the launcher finds it
def _work(job: Path) -> None:
    config = load_config(job / CONFIG)
    place = place_from_environment(os.environ)
    assert place is not None, "torch's launcher sets RANK and its companions"
    device = device_of(config, place)
    with process_group(place, device):
        train(config, job, make_mesh(config.sharding, device.type))


if __name__ == "__main__":
    end_with_parent()
    try:
        _work(Path(sys.argv[1]))
    except PreemptedError as error:
        sys.exit(error.exit_code)
    except ShardwrightError:
        sys.exit(REFUSED)
