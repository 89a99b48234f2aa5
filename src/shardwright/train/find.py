"""Which files a run's ``data.paths`` name. Every folder is looked at once, whatever the globs."""

from __future__ import annotations

import os
import sysconfig
from collections import Counter
from collections.abc import Collection, Sequence
from fnmatch import fnmatch, fnmatchcase
from glob import has_magic
from pathlib import Path

from shardwright.errors import ConfigError
from shardwright.train.records import is_saved_dataset
from shardwright.train.sections import DataSettings
from shardwright.untrusted import shown, usable_path

_MOST_ENTRIES = 2_000_000  # of the folders that are searched
_STDLIB = "stdlib:"
_ANY_DEPTH = "**"


def find_files(settings: DataSettings, paths: Sequence[str] | None = None) -> list[Path]:
    """Every file that ``settings`` names, each once, in the order of their names; a folder that ``datasets`` has
    written counts as one.

    Args:
        paths: in place of ``settings.paths``.

    Raises:
        ConfigError: a path that does not exist, a glob or folder that yields nothing or is too large to search, or
            everything excluded.
    """
    found: set[Path] = set()
    for text in settings.paths if paths is None else paths:
        found.update(_expand(text, settings.included))
    files = sorted(path for path in found if not any(fnmatch(path.as_posix(), glob) for glob in settings.exclude))
    if not files:
        raise ConfigError(
            f"data.exclude ({', '.join(settings.exclude)}) leaves none of the {len(found)} files that data.paths names."
        )
    return files


def check_paths(settings: DataSettings) -> None:
    """Raises ConfigError for a path that is no glob and does not exist. Nothing is searched, so it costs no time."""
    for text in (*settings.paths, *settings.validation_paths):
        path = _path(text)
        if not has_magic(str(path)) and not path.exists():
            raise _nothing_at(text, "does not exist")


def _path(text: str) -> Path:
    if text.startswith(_STDLIB):
        text = str(Path(sysconfig.get_path("stdlib"), text.removeprefix(_STDLIB).lstrip("/")))
    return usable_path(text, "One of data.paths", ConfigError)


def _nothing_at(text: str, what: str) -> ConfigError:
    return ConfigError(f"{shown(text)} in data.paths {what} (looked from {Path.cwd()}).")


def _expand(text: str, include: Sequence[str]) -> list[Path]:
    path = _path(text)
    if path.is_dir() and is_saved_dataset(path):
        return [path]
    if path.is_dir():
        inside = _search(path, [_ANY_DEPTH], text, hidden=True)
        files = [file for file in inside if any(fnmatch(file.name, pattern) for pattern in include)]
        if not files:
            kinds = ", ".join(f"{n} {kind or 'without suffix'}" for kind, n in _suffixes(inside).most_common(4))
            raise ConfigError(
                f"The folder {path} has no file that matches data.include ({', '.join(include)}). It has "
                f"{len(inside)} files{': ' + kinds if kinds else ''}. Set data.include to the names to take."
            )
        return files
    if path.is_file():
        return [path]
    magic = has_magic(str(path))
    fixed = next((number for number, part in enumerate(path.parts) if has_magic(part)), 0)
    files = _search(Path(*path.parts[:fixed]), path.parts[fixed:], text) if magic else []
    if not files:
        raise _nothing_at(text, "matches no file" if magic else "is no file" if path.exists() else "does not exist")
    return files


def _search(root: Path, pattern: Sequence[str], text: str, hidden: bool = False) -> list[Path]:
    """The files below ``root`` whose path fits ``pattern``, a glob for each part; ``**`` fits any number of folders.

    Links to folders are followed where a part of the pattern names them, and not below ``**``.

    Args:
        text: the path in the config, for errors.
        hidden: names that begin with a dot fit, too.
    """
    found: list[Path] = []
    waiting = [(root, _from_here({0}, pattern))]
    looked_at = 0
    while waiting:
        folder, places = waiting.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError:
            continue
        looked_at += len(entries)
        if looked_at > _MOST_ENTRIES:
            raise ConfigError(
                f"{shown(text)} in data.paths leads through more than {_MOST_ENTRIES:,} files and folders. Name the "
                "ones with the text."
            )
        for entry in entries:
            named = {place for place in places if _fits(entry.name, pattern, place, hidden)}
            deep = {place for place in places if _is_deep(pattern, place) and (hidden or entry.name[0] != ".")}
            if entry.is_dir():
                inside = {place + 1 for place in named} | (set() if entry.is_symlink() else deep)
                if inside:
                    waiting.append((Path(entry), _from_here(inside, pattern)))
            elif (len(pattern) - 1 in named | deep) and entry.is_file():
                found.append(Path(entry))
    return found


def _is_deep(pattern: Sequence[str], place: int) -> bool:
    return place < len(pattern) and pattern[place] == _ANY_DEPTH


def _fits(name: str, pattern: Sequence[str], place: int, hidden: bool) -> bool:
    """Whether a file or folder of this name fits the part at ``place``, one that is no ``**``."""
    if place >= len(pattern) or pattern[place] == _ANY_DEPTH:
        return False
    return fnmatchcase(name, pattern[place]) and (hidden or name[0] != "." or pattern[place][0] == ".")


def _from_here(places: Collection[int], pattern: Sequence[str]) -> frozenset[int]:
    """``places`` in the pattern, and those behind every ``**`` there, which may stand for no folder at all."""
    reached = set(places)
    for place in range(len(pattern)):
        if place in reached and pattern[place] == _ANY_DEPTH:
            reached.add(place + 1)
    return frozenset(reached)


def _suffixes(files: Sequence[Path]) -> Counter[str]:
    return Counter(file.suffix for file in files)
