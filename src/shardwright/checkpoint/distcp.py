"""The files of torch.distributed.checkpoint, read without unpickling: ``.metadata``, and tensors as ``torch.save``
writes them. Tensors are all that is read; whatever else is in there is refused.

The layout is that of torch 2.11 to 2.14.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from shardwright.checkpoint.records import Record, read_records
from shardwright.errors import CheckpointError
from shardwright.untrusted import ToldAs, shown

_METADATA = "torch.distributed.checkpoint.metadata."
_INFO = "torch.distributed.checkpoint.filesystem._StorageInfo"
_FILE = re.compile(r"__\d+_\d+\.distcp")
_LONGEST_NAME = 1024
_CELLS = 2**24  # of the grid that the chunks of one tensor make
_LOCAL_HEADER = 30  # bytes before a member's name in a zip file; its bytes 26 to 29 are the lengths of name and extra
_DESCRIPTION = 2**14  # bytes that torch.save writes around a tensor's own
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}


@dataclass(frozen=True)
class Place:
    """Where the bytes of a chunk are: in a file beside the metadata, from the byte ``offset`` on."""

    relative_path: str
    offset: int
    length: int


def parse_metadata(data: bytes, name: str) -> Metadata:
    """The metadata of a checkpoint that holds tensors only, each covered by its chunks once and in whole.

    Args:
        name: of the file, for errors.

    Raises:
        CheckpointError: anything else, or a chunk that lies outside of the checkpoint's own files.
    """
    root = _state(read_records(data, name), "Metadata", name)
    places = _places(_mapping(root.get("storage_data"), name), name)
    tensors: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, Place] = {}
    for key, stored in _mapping(root.get("state_dict_metadata"), name).items():
        if not isinstance(key, str) or not _is(stored, _METADATA + "TensorStorageMetadata"):
            raise CheckpointError(
                f"{name} says that {shown(key)} is no tensor. Checkpoints of Shardwright hold tensors only, and "
                "reading anything else could run code: this one was tampered with, do not use it."
            )
        if len(key) > _LONGEST_NAME:
            raise CheckpointError(f"{name} names a tensor {shown(key)}, in {len(key):,} characters.")
        tensors[key] = tensor = _tensor(stored, key, name)
        for number, chunk in enumerate(tensor.chunks):
            place = places.pop((key, tuple(chunk.offsets)), None)
            if place is None:
                raise CheckpointError(f"{name} does not say where the chunk of {key} at {tuple(chunk.offsets)} is.")
            if prod(chunk.sizes) * tensor.properties.dtype.itemsize > place.length:
                raise CheckpointError(f"{name} says that a chunk of {key} is larger than the bytes that hold it.")
            storage[MetadataIndex(key, chunk.offsets, number)] = place
    if places:
        raise CheckpointError(f"{name} has a place for {shown(next(iter(places)))}, which is no chunk of a tensor.")
    return Metadata(dict(tensors), {key: (key,) for key in tensors}, storage)


def _tensor(stored: Record, key: str, name: str) -> TensorStorageMetadata:
    state = _state(stored, "TensorStorageMetadata", name)
    properties: Any = state.get("properties")
    if not _is(properties, _METADATA + "TensorProperties") or not isinstance(properties.state, tuple):
        raise CheckpointError(f"{name} does not say what {key} consists of.")
    dtype = _dtype(properties.state[0], f"{name} for {key}")
    size = _size(state.get("size"), f"{name} for {key}")
    chunks = []
    for chunk in state["chunks"] if isinstance(state.get("chunks"), list) else ():
        part = _state(chunk, "ChunkStorageMetadata", name)
        offsets, sizes = (_size(part.get(what), f"{name} for {key}") for what in ("offsets", "sizes"))
        chunks.append(ChunkStorageMetadata(offsets, sizes))
    _require_covered(size, chunks, f"{key} in {name}")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _require_covered(size: torch.Size, chunks: Iterable[ChunkStorageMetadata], what: str) -> None:
    """Raises CheckpointError unless every element of a tensor of this size is in exactly one chunk."""
    boxes = [(chunk.offsets, chunk.sizes) for chunk in chunks]
    for offsets, sizes in boxes:
        fits = len(offsets) == len(sizes) == len(size)
        if not fits or any(at + extent > whole for at, extent, whole in zip(offsets, sizes, size, strict=True)):
            raise CheckpointError(f"A chunk of {what} lies outside of the tensor's shape {tuple(size)}.")
    edges = [sorted({0, whole, *(b[0][d] for b in boxes), *(b[0][d] + b[1][d] for b in boxes)}) for d, whole in
             enumerate(size)]  # fmt: skip
    cells = [len(edge) - 1 for edge in edges]
    if prod(cells) > _CELLS:
        raise CheckpointError(f"{what} is in chunks of more than {_CELLS:,} different places.")
    times = np.zeros(cells, dtype=np.int32)  # how often each cell of the grid that all chunks make is covered
    at = [{edge: number for number, edge in enumerate(ends)} for ends in edges]
    for offsets, sizes in boxes:
        times[tuple(slice(at[d][o], at[d][o + s]) for d, (o, s) in enumerate(zip(offsets, sizes, strict=True)))] += 1
    if not (times == 1).all():
        part = "some of it is in no chunk" if (times == 0).any() else "some of it is in several chunks"
        raise CheckpointError(f"{what} is not whole: {part}.")


def _places(storage: Mapping[Any, Any], name: str) -> dict[tuple[str, tuple[int, ...]], Place]:
    """(tensor, offsets of the chunk) -> where its bytes are."""
    places = {}
    for index, info in storage.items():
        key, place = _state(index, "MetadataIndex", name), info.state if _is(info, _INFO) else None
        if not isinstance(place, dict) or place.get("transform_descriptors") or not isinstance(key.get("fqn"), str):
            raise CheckpointError(f"{name} does not say where {shown(key.get('fqn'))} is.")
        file, start, length = place.get("relative_path"), place.get("offset"), place.get("length")
        if not isinstance(file, str) or not _FILE.fullmatch(file):
            raise CheckpointError(f"{name} names {shown(file)}, which is no file of a checkpoint, as __0_0.distcp is.")
        if start is None or length is None or not (_is_count(start) and _is_count(length)):
            raise CheckpointError(f"{name} puts {key['fqn']} at {shown(start)} in {file}, {shown(length)} bytes.")
        offset = () if key.get("offset") is None else tuple(_size(key["offset"], name))
        if (key["fqn"], offset) in places:
            raise CheckpointError(f"{name} names two places for the chunk of {key['fqn']} at {offset}.")
        places[key["fqn"], offset] = Place(file, start, length)
    return places


class Window(io.RawIOBase):
    """A part of an open file, as a file."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        wanted = memoryview(buffer)[: max(self._length - self._at, 0)]
        self._file.seek(self._start + self._at)
        read = self._file.readinto(wanted)  # type: ignore[attr-defined]
        self._at += read
        return read


def read_tensor(file: Window, dtype: torch.dtype, sizes: torch.Size, name: str) -> Tensor:
    """The tensor in ``file``, as ``torch.save`` wrote it.

    Args:
        file: its bytes and nothing else.
        dtype: that it must have.
        sizes: that it must have.
        name: for errors.

    Raises:
        CheckpointError: something else, or damaged.
    """
    with ToldAs(CheckpointError, f"{name} is damaged"), zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
        (described,) = (member for path, member in members.items() if path.endswith("/data.pkl"))
        if described.file_size > _DESCRIPTION or described.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{name} has a description of {described.file_size:,} bytes.")
        offset, shape, strides, storage, count = _described(read_records(archive.read(described), name), dtype, name)
        if shape != tuple(sizes):
            raise CheckpointError(f"{name} has the shape {shape} and not {tuple(sizes)}.")
        values = members[f"{described.filename.removesuffix('.pkl')}/{storage}"]
        if values.compress_type != zipfile.ZIP_STORED or values.file_size != count * dtype.itemsize:
            raise CheckpointError(f"{name} has {values.file_size:,} bytes for {count:,} numbers.")
        flat = torch.empty(count, dtype=dtype)
        file.seek(values.header_offset)
        header = file.read(_LOCAL_HEADER)
        file.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), io.SEEK_CUR)
        rest = flat.view(torch.uint8).numpy().data if count else memoryview(b"")
        while rest:
            read = file.readinto(rest)
            if not read:
                raise CheckpointError(f"{name} ends before its last number.")
            rest = rest[read:]
        return flat.as_strided(shape, strides, offset)


def _described(tensor: Any, dtype: torch.dtype, name: str) -> tuple[int, tuple[int, ...], tuple[int, ...], str, int]:
    """Offset, shape, strides, and which storage of how many numbers, of what ``torch.save`` describes."""
    called = tensor.name if isinstance(tensor, Record) else ""
    if called not in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"):
        raise CheckpointError(f"{name} is no plain tensor ({called or type(tensor).__name__}).")
    (_, kind, key, _, count), offset, shape, strides = tensor.arguments[:4]
    if called.endswith("v3"):  # dtypes that have no storage of their own are bytes
        found = _dtype(tensor.arguments[6], name)
        count = count // found.itemsize
    else:
        found = _STORAGES[kind.name.removeprefix("torch.")]
    if found is not dtype:
        raise CheckpointError(f"{name} holds {found} and not {dtype}.")
    return offset, tuple(shape), tuple(strides), str(key), count


def _dtype(record: Any, where: str) -> torch.dtype:
    """The dtype that a pickle names: a class of records called ``torch.float32``."""
    named = record.name if isinstance(record, type) and issubclass(record, Record) else ""
    found = vars(torch).get(named.removeprefix("torch."))
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"{where} has the dtype {shown(named or record)}, which there is not.")
    return found


def _size(record: Any, where: str) -> torch.Size:
    (numbers,) = record.arguments if _is(record, "torch.Size") and len(record.arguments) == 1 else (None,)
    if not isinstance(numbers, tuple | list) or len(numbers) > 64 or not all(map(_is_count, numbers)):
        raise CheckpointError(f"{where} has {shown(numbers)} for a size.")
    return torch.Size(numbers)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _is(record: Any, name: str) -> bool:
    return isinstance(record, Record) and record.name == name


def _state(record: Any, cls: str, name: str) -> dict[str, Any]:
    """The attributes of the object that ``record`` stands for, which must be a ``cls`` of DCP's metadata."""
    if not _is(record, _METADATA + cls) or not isinstance(record.state, dict):
        what = record.name if isinstance(record, Record) else type(record).__name__
        raise CheckpointError(f"{name} has a {what} where torch writes a {cls}. It is damaged or was tampered with.")
    return record.state


def _mapping(value: Any, name: str) -> Mapping[Any, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} is no metadata of a checkpoint.")
    return value
