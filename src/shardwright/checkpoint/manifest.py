"""The list of the files that Shardwright wrote into a folder, with their sizes and SHA-256 checksums.

It says which damage there is, and which files are ours to replace or remove: no other ever is. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from shardwright.errors import CheckpointError
from shardwright.untrusted import is_plain_name, parse_json, read_file, shown

MANIFEST = "manifest.json"
_BYTES = 32 * 2**20
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
    """Write ``manifest.json``, the last file of a folder: ``sums``, and those of all files that are not in it."""
    rest = [folder / file for file in files_in(folder) if file not in sums]
    text = json.dumps({"files": sums | sums_of(folder, rest)}, indent=1, sort_keys=True)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def files_in(folder: Path) -> Iterator[str]:
    """The path inside ``folder`` of every file in it, at any depth. A link is a file, whatever it leads to."""
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        for name in sorted([*files, *links]):
            yield Path(place, name).relative_to(folder).as_posix()


def read_manifest(folder: Path) -> Sums:
    """The manifest of ``folder``.

    Raises:
        CheckpointError: there is none, it is not one, or it names something outside of the folder.
    """
    try:
        text = read_file(folder / MANIFEST, CheckpointError, _BYTES)
    except CheckpointError as error:
        raise CheckpointError(f"{folder} has no readable {MANIFEST}, so it is no whole checkpoint: {error}") from error
    return parse_manifest(text, str(folder / MANIFEST))


def parse_manifest(text: str | bytes, name: str) -> Sums:
    """As :func:`read_manifest`, from the text of the file called ``name``."""
    data = parse_json(text, name, CheckpointError)
    files = data.get("files") if isinstance(data, Mapping) else None
    if not isinstance(files, Mapping):
        raise CheckpointError(f"{name} has no mapping 'files'.")
    for file, value in files.items():
        if file == MANIFEST or not all(is_plain_name(part) for part in file.split("/")):
            raise CheckpointError(f"{name} names {shown(file)}, which may lie outside of its folder.")
        if not (isinstance(value, list) and [type(one) for one in value] == [int, str]):
            raise CheckpointError(f"{name} has {shown(value)} for {file}; it must be a size and a checksum.")
    return {file: (value[0], value[1]) for file, value in files.items()}


def ours_in(folder: Path) -> set[str]:
    """The paths in ``folder`` that Shardwright wrote, by its manifest; none where it has none that can be read."""
    if not (folder / MANIFEST).is_file():
        return set()
    try:
        return {*read_manifest(folder), MANIFEST}
    except CheckpointError:
        return set()


def foreign_in(folder: Path, ours: Collection[str]) -> list[str]:
    """The paths in ``folder`` that are not ``ours``: files, and folders that hold nothing of ours."""
    parents = {"/".join(parts[:end]) for parts in (path.split("/") for path in ours) for end in range(1, len(parts))}
    found: list[str] = []
    waiting = [""]
    while waiting:
        at = waiting.pop()
        for entry in sorted(os.scandir(folder / at), key=lambda entry: entry.name):
            path = f"{at}/{entry.name}" if at else entry.name
            if path in parents and entry.is_dir(follow_symlinks=False):
                waiting.append(path)
            elif path not in ours:
                found.append(path)
    return found


def verify(folder: Path, share: int = 0, of: int = 1, *, exactly: bool = False, without: Collection[str] = ()) -> None:
    """Read every ``of``-th file that the manifest lists (from the ``share``-th on) and compare its checksum.

    Args:
        exactly: nothing else may be in the folder.
        without: suffixes of files that may be missing.

    Raises:
        CheckpointError: a file is missing, has another size, other content, or is not listed.
    """
    sums = read_manifest(folder)
    if exactly and (foreign := foreign_in(folder, {*sums, MANIFEST})):
        raise CheckpointError(
            f"{folder} holds {foreign[0]}, which its {MANIFEST} does not list: it was not written with the rest, so "
            "nothing is read. Move it out of the folder."
        )
    for file in sorted(sums)[share::of]:
        path = folder / file
        size, digest = sums[file]
        if not path.is_file():
            if path.suffix in without:
                continue
            raise CheckpointError(f"{folder} lacks {file}, which its manifest lists.")
        found = path.stat().st_size
        if found != size:
            raise CheckpointError(f"{path} has {found:,} bytes, but was written with {size:,}.")
        if sums_of(folder, [path])[file][1] != digest:
            raise CheckpointError(f"{path} is not what was written: its checksum differs. Some bits flipped.")


def require_listed(folder: Path, files: Iterable[str]) -> None:
    """Raises CheckpointError for the first of ``files`` that is in ``folder`` and not in its manifest."""
    sums = read_manifest(folder)
    for file in files:
        if file not in sums and (folder / file).exists():
            raise CheckpointError(f"{folder / file} is not listed in {MANIFEST}: it was not written with the rest.")
