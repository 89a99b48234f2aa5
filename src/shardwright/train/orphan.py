"""Ends a rank whose launcher is gone. Standard library only: it acts while torch is still being imported."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

ORPHANED = 71  # exit code
_LOOK_EVERY = 0.5  # seconds


def end_with_parent(parent: int, job: Path | None = None) -> None:
    """End this process when the process ``parent``, its launcher, is gone: even if that was killed and told nobody.

    Args:
        parent: its process id, from the launcher itself: it may be gone before this process can ask for it.
        job: the launcher's folder, which it can remove no more.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_EVERY)
        if job is not None:
            shutil.rmtree(job, ignore_errors=True)
        os._exit(ORPHANED)  # at once: nobody is left to tell, and a collective may never come back

    threading.Thread(target=watch, name="orphan", daemon=True).start()
