"""A folder of safetensors files: what is in it. Nothing here unpickles anything."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from shardwright.errors import CheckpointError
from shardwright.untrusted import ToldAs, is_plain_name, parse_json, read_file, shown

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_HEADER_BYTES = 32 * 2**20  # of one file; a hundred thousand tensors have about 12 MB
_MOST_TENSORS = 200_000  # of a folder; a model of a trillion parameters, each expert by itself, has about 140,000
_LONGEST_NAME = 512
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
        places = read_index(read_file(path / INDEX, CheckpointError), INDEX)
    elif (path / SINGLE).is_file():
        return _entries(path, SINGLE)
    else:
        raise CheckpointError(_nothing_to_read(path))
    entries: dict[str, Entry] = {}
    for file in sorted(set(places.values())):
        if not (path / file).is_file():
            raise CheckpointError(f"{path} has no {file}, which its {INDEX} names. Fetch or copy the folder again.")
        entries |= {name: entry for name, entry in _entries(path, file).items() if places.get(name, file) == file}
        _require_names(entries, path)
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
    data = parse_json(text, name, CheckpointError)
    places = data.get("weight_map") if isinstance(data, Mapping) else None
    if not isinstance(places, Mapping):
        raise CheckpointError(f"{name} has no mapping 'weight_map', so it is no index of safetensors files.")
    _require_names(places, name)
    for tensor, file in places.items():
        if not isinstance(file, str) or not is_plain_name(file) or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{name} puts {shown(tensor)} into {shown(file)}. Only plain names of .safetensors files are read: no "
                "folders, no paths. If you trust the folder, move the file into it and correct the index."
            )
    return dict(places)


def _entries(path: Path, file: str) -> dict[str, Entry]:
    offsets = _offsets(path / file)
    _require_names(offsets, path / file)
    with (
        ToldAs(CheckpointError, f"{path / file} is damaged", " Fetch or copy it again."),
        safe_open(path / file, framework="pt") as opened,  # checks the header, and that the file has all values
    ):
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        return {name: Entry(file, offsets[name], tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def _require_names(tensors: Collection[str], where: Path | str) -> None:
    """Raises CheckpointError for more tensors, or longer names of tensors, than any model has."""
    if len(tensors) > _MOST_TENSORS:
        raise CheckpointError(f"{where} holds more than {_MOST_TENSORS:,} tensors, which no model has.")
    longest = max(tensors, key=len, default="")
    if len(longest) > _LONGEST_NAME:
        raise CheckpointError(f"{where} names a tensor {shown(longest)}, in {len(longest):,} characters.")


def _offsets(file: Path) -> dict[str, int]:
    """Where the values of each tensor begin, in bytes: safetensors reads the header, but does not tell."""
    with ToldAs(CheckpointError, f"{file} is damaged", " Fetch or copy it again."):
        if not file.is_file():
            raise CheckpointError(f"{file} is no regular file, so it is not read.")
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > _HEADER_BYTES:
                raise CheckpointError(
                    f"{file} begins with a header of {length:,} bytes; headers are read up to {_HEADER_BYTES:,}. It is "
                    "no safetensors file, or damaged."
                )
            header = parse_json(opened.read(length), f"The header of {file}", CheckpointError)
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
