"""Finding and reading the training text."""

from __future__ import annotations

import json
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from glob import glob, has_magic
from pathlib import Path

from shardwright.errors import ConfigError
from shardwright.train.config import DataSettings

_STDLIB = "stdlib:"


def find_files(settings: DataSettings) -> list[Path]:
    """Every file that ``settings`` names, each once, in the order of their names.

    Raises:
        ConfigError: a path that does not exist, a glob or folder that yields nothing, or everything excluded.
    """
    found: set[Path] = set()
    for text in settings.paths:
        found.update(_expand(text, settings.include))
    files = sorted(path for path in found if not any(fnmatch(path.as_posix(), glob) for glob in settings.exclude))
    if not files:
        raise ConfigError(
            f"data.exclude ({', '.join(settings.exclude)}) leaves none of the {len(found)} files that data.paths names."
        )
    return files


def _expand(text: str, include: Sequence[str]) -> list[Path]:
    if text.startswith(_STDLIB):
        text = str(Path(sysconfig.get_path("stdlib"), text.removeprefix(_STDLIB).lstrip("/")))
    path = Path(text).expanduser()
    if path.is_dir():
        inside = [file for file in path.rglob("*") if file.is_file()]
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
    matches = [Path(match) for match in glob(str(path), recursive=True)] if has_magic(str(path)) else []
    files = [match for match in matches if match.is_file()]
    if not files:
        what = "matches no file" if has_magic(str(path)) else "does not exist"
        raise ConfigError(f"{text} in data.paths {what} (looked from {Path.cwd()}).")
    return files


def _suffixes(files: Sequence[Path]) -> Counter[str]:
    return Counter(file.suffix for file in files)


def read_texts(files: Sequence[Path], text_key: str) -> Iterator[str]:
    """The texts in ``files``: one a line of a ``.jsonl`` file, one a file otherwise; empty ones are left out.

    Raises:
        ConfigError: a file that is not UTF-8, or a JSONL line without the text; the message has file and line.
    """
    for file in files:
        try:
            if file.suffix == ".jsonl":
                yield from _read_jsonl(file, text_key)
            else:
                text = file.read_text(encoding="utf-8")
                if text.strip():
                    yield text
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{file} is not UTF-8 text (byte {error.start}). Convert it, or leave it out with data.exclude."
            ) from None
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {error.strerror}.") from None


def _read_jsonl(file: Path, text_key: str) -> Iterator[str]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{file}, line {number}, is not valid JSON: {error.msg}.") from None
            text = record.get(text_key) if isinstance(record, dict) else None
            if not isinstance(text, str):
                keys = ", ".join(map(repr, record)) if isinstance(record, dict) else "no keys"
                raise ConfigError(
                    f"{file}, line {number}, has no text under the key {text_key!r} (it has {keys}). Set "
                    "data.text_key to the key that holds the text."
                )
            if text.strip():
                yield text
