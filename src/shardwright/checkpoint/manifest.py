"""The list of a folder's files with their sizes and SHA-256 checksums."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shardwright.checkpoint.folder import is_plain_name
from shardwright.errors import CheckpointError

MANIFEST = "manifest.json"
Sums = dict[str, tuple[int, str]]  # path inside the folder, with "/" -> (bytes, SHA-256 in hex)


def sums_of(folder: Path, files: Iterable[Path]) -> Sums:
    """Size and checksum of ``files`` in ``folder``."""
    sums: Sums = {}
    for file in files:
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        sums[file.relative_to(folder).as_posix()] = (file.stat().st_size, digest)
    return sums


def write_manifest(folder: Path, sums: Sums) -> None:
    """Write ``manifest.json``, the last file of a folder."""
    (folder / MANIFEST).write_text(json.dumps({"files": sums}, indent=1, sort_keys=True), encoding="utf-8")


def read_manifest(folder: Path) -> Sums:
    """The manifest of ``folder``.

    Raises:
        CheckpointError: there is none, it is not one, or it names something outside of the folder.
    """
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder} has no readable {MANIFEST}, so it is no whole checkpoint: {error}.") from error
    return parse_manifest(text, str(folder / MANIFEST))


def parse_manifest(text: str, name: str) -> Sums:
    """As :func:`read_manifest`, from the text of the file called ``name``."""
    try:
        data: Any = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{name} is not valid JSON: {error}.") from error
    files = data.get("files") if isinstance(data, Mapping) else None
    if not isinstance(files, Mapping):
        raise CheckpointError(f"{name} has no mapping 'files'.")
    for file, value in files.items():
        if not all(is_plain_name(part) for part in file.split("/")):
            raise CheckpointError(f"{name} names {file!r}, which may lie outside of its folder.")
        if not (isinstance(value, list) and [type(one) for one in value] == [int, str]):
            raise CheckpointError(f"{name} has {value!r} for {file}; it must be a size and a checksum.")
    return {file: (value[0], value[1]) for file, value in files.items()}


def verify(folder: Path, share: int = 0, of: int = 1) -> None:
    """Read every ``of``-th file that the manifest lists (from the ``share``-th on) and compare its checksum.

    Raises:
        CheckpointError: a file is missing, has another size, or other content.
    """
    sums = read_manifest(folder)
    for file in sorted(sums)[share::of]:
        size, digest = sums[file]
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder} lacks {file}, which its manifest lists.")
        found = (folder / file).stat().st_size
        if found != size:
            raise CheckpointError(f"{folder / file} has {found:,} bytes, but was written with {size:,}.")
        if sums_of(folder, [folder / file])[file][1] != digest:
            raise CheckpointError(f"{folder / file} is not what was written: its checksum differs. Some bits flipped.")
