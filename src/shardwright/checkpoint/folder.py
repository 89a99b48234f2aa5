"""A folder of safetensors files: what is in it. Nothing here unpickles anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from shardwright.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Entry:
    """One tensor of a folder; its values lie in ``file`` from the byte ``offset`` on, the last dim first."""

    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def open_folder(path: Path) -> dict[str, Entry]:
    """Name -> entry of every tensor in the safetensors files of ``path``. Reads headers only.

    Raises:
        CheckpointError: no safetensors weights, a damaged file, an index that names a file outside of the folder, or
            one that does not agree with the files.
    """
    if (path / INDEX).is_file():
        places = read_index((path / INDEX).read_bytes(), INDEX)
    elif (path / SINGLE).is_file():
        return _entries(path, SINGLE)
    else:
        raise CheckpointError(_nothing_to_read(path))
    entries: dict[str, Entry] = {}
    for file in sorted(set(places.values())):
        if not (path / file).is_file():
            raise CheckpointError(f"{path} has no {file}, which its {INDEX} names. Fetch or copy the folder again.")
        entries |= {name: entry for name, entry in _entries(path, file).items() if places.get(name, file) == file}
    lost = sorted(set(places) - set(entries))
    if lost:
        raise CheckpointError(
            f"{INDEX} in {path} says that {places[lost[0]]} holds {lost[0]}, but it does not ({len(lost)} such names). "
            "The index belongs to other files; fetch or copy the folder again."
        )
    return entries


def read_index(text: bytes, name: str) -> dict[str, str]:
    """Tensor name -> file name, from the JSON of an index file.

    Raises:
        CheckpointError: not such JSON, or a file name that is not the plain name of a safetensors file.
    """
    try:
        data: Any = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{name} is not valid JSON: {error}.") from error
    places = data.get("weight_map") if isinstance(data, Mapping) else None
    if not isinstance(places, Mapping):
        raise CheckpointError(f"{name} has no mapping 'weight_map', so it is no index of safetensors files.")
    for tensor, file in places.items():
        if not isinstance(file, str) or not is_plain_name(file) or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{name} puts {tensor!r} into {file!r}. Only plain names of .safetensors files are read: no folders, "
                "no paths. If you trust the folder, move the file into it and correct the index."
            )
    return dict(places)


def is_plain_name(file: str) -> bool:
    """Whether ``file`` names something in a folder, and nothing outside of it on any system."""
    return bool(file) and file not in (".", "..") and not any(c in '/\\:*?"<>|' or ord(c) < 32 for c in file)


def _entries(path: Path, file: str) -> dict[str, Entry]:
    try:
        with safe_open(path / file, framework="pt") as opened:  # checks the header, and that the file has all values
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            offsets = _offsets(path / file)
            return {
                name: Entry(file, offsets[name], tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
            }
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path / file} is damaged: {error}. Fetch or copy it again.") from error


def _offsets(file: Path) -> dict[str, int]:
    """Where the values of each tensor begin, in bytes: safetensors reads the header, but does not tell."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    return {name: 8 + length + told["data_offsets"][0] for name, told in header.items() if name != "__metadata__"}


def _nothing_to_read(path: Path) -> str:
    if not path.is_dir():
        return f"There is no folder {path}."
    if (path / "adapter_config.json").is_file():
        return (
            f"{path} holds PEFT adapters, which are not loaded into a sharded model. Load the base model they name and "
            "them with PEFT in one process, merge_and_unload(), save that, and load the result."
        )
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        return (
            f"{path} holds {pickles[0]} but no {SINGLE}. Files of that kind are pickles, which can run any code when "
            "read, so they are not read. Convert the model to safetensors once, on a machine you can lose."
        )
    return f"{path} has neither {SINGLE} nor {INDEX}, so it holds no weights."
