"""A folder of safetensors files: what is in it, and slices of it. Nothing here unpickles anything."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shardwright.checkpoint.layout import Box
from shardwright.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SLICE_BYTES = 64 * 2**20  # the most host memory that reading takes
_MAPPED = SLICE_BYTES // 2  # of a file at once; a slice whose rows lie apart is copied out of that, as much again
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Entry:
    """One tensor of a folder."""

    file: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it: "F32", "BF16", ...


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
        with safe_open(path / file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            return {name: Entry(file, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except SafetensorError as error:
        raise CheckpointError(f"{path / file} is damaged: {error}. Fetch or copy it again.") from error


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


class SliceReader:
    """Reads boxes of the tensors in a folder.

    The files are mapped into memory, and mapped anew before they count for more than 32 MB of this process's memory.
    Boxes that :func:`split_box` makes keep to that.

    Attributes:
        bytes_read: size of all boxes read so far.
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry]) -> None:
        self.bytes_read = 0
        self._path = path
        self._entries = entries
        self._stack = ExitStack()
        self._open: tuple[str, Any] | None = None
        self._since_opened = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def read(self, name: str, box: Box) -> Tensor:
        """A box of the tensor ``name``, on the CPU. It lies in the file: use it before the next call, then drop it.

        Raises:
            CheckpointError: the file cannot be read (any more).
        """
        entry = self._entries[name]
        span = _span(box, entry.shape) * element_size(entry)
        try:
            opened = self._file(entry.file, span)
            value = opened.get_slice(name)[box] if box else opened.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"Cannot read {name} from {self._path}: {error}.") from error
        self.bytes_read += value.numel() * value.element_size()
        self._since_opened += span
        return value

    def whole(self, name: str) -> Tensor:
        """All of the tensor ``name``, in memory of its own."""
        box = tuple(slice(0, size) for size in self._entries[name].shape)
        whole = torch.empty(self._entries[name].shape, dtype=self.read(name, tuple(slice(0, 0) for _ in box)).dtype)
        for part in split_box(box, whole.shape, whole.element_size()):
            whole[part] = self.read(name, part)
        return whole

    def _file(self, file: str, more: int) -> Any:
        if self._open is not None and self._open[0] == file and self._since_opened + more <= _MAPPED:
            return self._open[1]
        self._close()
        self._open = (file, self._stack.enter_context(safe_open(self._path / file, framework="pt")))
        return self._open[1]

    def _close(self) -> None:
        self._stack.close()
        self._open = None
        self._since_opened = 0


def split_box(box: Box, shape: Sequence[int], element_size: int) -> list[Box]:
    """``box`` of an array of ``shape`` in pieces, cut along its first dims; an empty box gives none.

    From the first byte of a piece to its last there are at most 32 MB in the file: a few columns of a wide matrix touch
    all of its pages.
    """
    sizes = [part.stop - part.start for part in box]
    if 0 in sizes:
        return []
    if _span(box, shape) * element_size <= _MAPPED:
        return [box]
    dim = next(i for i, size in enumerate(sizes) if size > 1)
    rows = max(1, _MAPPED // (prod(shape[dim + 1 :]) * element_size))
    first, stop = box[dim].start, box[dim].stop
    cuts = [slice(start, min(start + rows, stop)) for start in range(first, stop, rows)]
    return [piece for cut in cuts for piece in split_box((*box[:dim], cut, *box[dim + 1 :]), shape, element_size)]


def _span(box: Box, shape: Sequence[int]) -> int:
    """Elements from the first of ``box`` to its last, in an array of ``shape`` as it lies in memory."""
    span, stride = 1, 1
    for part, size in zip(reversed(box), reversed(shape), strict=True):
        if part.stop <= part.start:
            return 0
        span += (part.stop - part.start - 1) * stride
        stride *= size
    return span


def element_size(entry: Entry) -> int:
    """Bytes per element; "BF16" and "F8_E4M3" carry their number of bits."""
    bits = re.search(r"\d+", entry.dtype)
    return max(1, int(bits.group()) // 8) if bits else 1
