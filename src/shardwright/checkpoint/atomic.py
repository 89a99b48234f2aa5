"""Folders and files that are there whole or not at all, and that take the place of nothing but our own.

A folder is written beside the one whose name it will get, and renamed when it is on the disk. While that goes on, and
after a kill, there may be beside ``NAME``: ``.NAME.unfinished`` (what is being written), ``.NAME.old`` (what it takes
the place of) and ``.NAME.lock`` (held by the process that writes; a kill leaves it, which shows that the others are
ours to clear up). Standard library only.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Self

from shardwright.checkpoint.manifest import MANIFEST, files_in, foreign_in, ours_in
from shardwright.errors import CheckpointError
from shardwright.lock import Lock


def unfinished(folder: Path) -> Path:
    """Where ``folder`` is written before it gets its name: beside it, so that a rename is enough."""
    return folder.with_name(f".{folder.name}.unfinished")


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def require_replaceable(folder: Path, overwrite: bool, names: Collection[str] = ()) -> None:
    """Whether a folder may be written as ``folder``; changes nothing.

    Args:
        overwrite: files there that Shardwright wrote may be replaced, and others may stay beside the new ones.
        names: files that will be written, as far as that is known.

    Raises:
        CheckpointError: something is there that would be replaced.
    """
    if not folder.exists():
        if folder.is_symlink():
            raise CheckpointError(f"{folder} is a link to nothing. Remove it, or make what it leads to.")
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} exists and is no folder, so nothing is written there. Choose another name.")
    if not any(folder.iterdir()):
        return
    ours = ours_in(folder)
    if not overwrite:
        whose = "holds what Shardwright wrote" if ours else "holds files that Shardwright did not write"
        raise CheckpointError(
            f"{folder} {whose}. Choose another name, or set overwrite: then the files that its {MANIFEST} lists are "
            "replaced, and all others stay."
        )
    for path in foreign_in(folder, ours):
        for name in names:
            if path == name or path.startswith(f"{name}/") or name.startswith(f"{path}/"):
                raise CheckpointError(
                    f"{folder / path} was not written by Shardwright (no {MANIFEST} there lists it), so it is not "
                    "replaced. Move it, or choose another name."
                )


class FolderWriter:
    """Writes one folder; a context manager, at whose end what was not finished goes. One process has it.

    Args:
        folder: its name when it is whole. A link is followed.
        overwrite: as for :func:`require_replaceable`.

    Attributes:
        path: where to put the files.

    Raises:
        CheckpointError: :func:`require_replaceable` refuses it, or another process is writing it.
        OSError: the folder beside it cannot be made.
    """

    def __init__(self, folder: Path, overwrite: bool = False) -> None:
        self._folder = folder = folder.resolve()
        require_replaceable(folder, overwrite)
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.path = unfinished(folder)
        self._lock = Lock(folder.with_name(f".{folder.name}.lock"))
        if not self._lock.take():
            raise CheckpointError(f"{folder} is being written by another process ({self._lock.holder()}).")
        try:
            if self._lock.left_over:
                recover(folder)
            for path in (self.path, _old(folder)):
                if path.exists():
                    raise CheckpointError(f"{path} is in the way, and was not left by a save. Move it.")
            self.path.mkdir()
        except BaseException:
            self._lock.release()
            raise

    def finish(self) -> None:
        """Bring everything to the disk and give it its name. Files of ours that had that name are replaced.

        A kill at any moment leaves the old folder or the new one, for an instant under a name that begins with a dot.

        Raises:
            CheckpointError: a file that is not ours would be replaced. Nothing is changed then.
        """
        folder, old = self._folder, _old(self._folder)
        require_replaceable(folder, True, list(files_in(self.path)))
        for path in [*self.path.rglob("*"), self.path]:
            sync(path)
        if folder.exists():
            folder.rename(old)
        try:
            self.path.rename(folder)
        except OSError:
            old.rename(folder)
            raise
        sync(folder.parent)
        if old.exists():
            _settle(old, folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            shutil.rmtree(self.path, ignore_errors=True)
        finally:
            self._lock.release()


def recover(folder: Path) -> None:
    """Clear up what a kill left beside ``folder``. Nobody else may be writing it."""
    shutil.rmtree(unfinished(folder), ignore_errors=True)
    old = _old(folder)
    if old.exists() and not folder.exists():
        old.rename(folder)
    elif old.exists():
        _settle(old, folder)


def _settle(old: Path, folder: Path) -> None:
    """``folder`` has taken the place of ``old``: move what is not ours over, remove the rest."""
    for path in foreign_in(old, ours_in(old)):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (old / path).rename(folder / path)
    _remove_ours(old)


def _remove_ours(folder: Path) -> None:
    """Remove the files that the manifest lists and the folders that are empty then; the manifest after all others."""
    there = ours_in(folder).intersection(files_in(folder))  # not what a link to a folder leads to
    for path in there - {MANIFEST}:
        (folder / path).unlink()
    for place, _, _ in sorted(os.walk(folder), reverse=True):
        if not os.listdir(place):
            os.rmdir(place)
    if MANIFEST in there:
        (folder / MANIFEST).unlink()
        if not any(folder.iterdir()):
            folder.rmdir()


def remove(folder: Path) -> None:
    """Remove a folder of ours; a kill in the middle leaves nothing under its name. What is not ours stays there."""
    if folder.is_symlink():
        folder.unlink()
        return
    gone = folder.with_name(f".{folder.name}.removed")
    folder.rename(gone)
    _finish_removing(gone, folder)


def _finish_removing(gone: Path, folder: Path) -> None:
    _remove_ours(gone)
    if gone.exists():
        gone.rename(folder)  # without its manifest


def recover_all(parent: Path, names: re.Pattern[str]) -> None:
    """Clear up what a kill left in ``parent`` of the folders called ``names``. Nobody else may be writing there."""
    for path in sorted(parent.iterdir()):
        name, _, what = path.name.removeprefix(".").rpartition(".")
        folder = parent / name
        if path.name.startswith(".") and names.fullmatch(name) and what == "removed":
            _finish_removing(path, folder)
        if path.name.startswith(".") and names.fullmatch(name) and what == "lock":
            lock = Lock(path)
            if lock.take():
                recover(folder)
                lock.release()


def sync(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a file beside ``path`` and give it that name when it is on the disk. What had the name is replaced.

    Raises:
        OSError: it cannot be written; what was there still is.
    """
    beside = path.with_name(f".{path.name}.unfinished")
    try:
        beside.write_text(text, encoding="utf-8")
        sync(beside)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
