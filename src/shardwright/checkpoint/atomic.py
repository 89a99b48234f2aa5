"""Folders that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def unfinished(folder: Path) -> Path:
    """Where ``folder`` is written before it gets its name: beside it, so that a rename is enough."""
    return folder.with_name(f".{folder.name}.unfinished")


def begin(folder: Path) -> Path:
    """Make the unfinished folder, empty; what an earlier, killed attempt left there goes."""
    temporary = unfinished(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def finish(folder: Path) -> None:
    """Bring the unfinished folder to the disk and give it its name. What had that name is replaced.

    A kill at any moment leaves the old folder or the new one, for an instant under a name that begins with a dot.
    """
    temporary, old = unfinished(folder), folder.with_name(f".{folder.name}.old")
    for path in [*temporary.rglob("*"), temporary]:
        sync(path)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(parent: Path) -> None:
    """Clear up what a kill left in ``parent``: unfinished folders go, replaced ones without a successor come back."""
    for old in parent.glob(".*.old"):
        folder = parent / old.name.removeprefix(".").removesuffix(".old")
        if not folder.exists():
            old.rename(folder)
    for left in [*parent.glob(".*.unfinished"), *parent.glob(".*.removed"), *parent.glob(".*.old")]:
        shutil.rmtree(left)


def remove(folder: Path) -> None:
    """Remove a folder; a kill in the middle leaves nothing under its name."""
    gone = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)


def abandon(folder: Path) -> None:
    """Remove the unfinished folder."""
    shutil.rmtree(unfinished(folder), ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
