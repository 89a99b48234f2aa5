"""Folders in the system's temporary directory: each has an owner, and those of dead owners are removed.

Standard library only.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shardwright.errors import RunError
from shardwright.lock import Lock

PREFIX = "shardwright-"
_LOCK = ".lock"
_YOUNG = 60.0  # seconds that a folder may be without its lock: it gets it right after it is made


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder, removed at the end; those that killed processes have left are removed first.

    Raises:
        RunError: it cannot be made.
    """
    remove_left_over()
    try:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        lock = Lock(folder / _LOCK)
        lock.take()
    except OSError as error:
        raise RunError(f"No folder can be made in {tempfile.gettempdir()}: {error.strerror}.") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def remove_left_over() -> None:
    """Remove the folders of processes of this user that are gone."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            found = folder.lstat()
            locked = (folder / _LOCK).exists()
            if found.st_uid != os.getuid() or not folder.is_dir() or folder.is_symlink():
                continue
            if not locked and time.time() - found.st_mtime < _YOUNG:
                continue
            lock = Lock(folder / _LOCK)
            if lock.take():
                shutil.rmtree(folder, ignore_errors=True)
                lock.release()
        except OSError:
            continue  # another process is removing it, too
