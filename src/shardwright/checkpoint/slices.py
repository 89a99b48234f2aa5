"""Boxes of the tensors in a folder, read straight into other tensors: the bytes that are needed, and no mapping.

A mapped file that is cut while it is read ends the process; a read says so. Where dtype and layout allow, the bytes go
from the file into the tensor; elsewhere (other dtype, another device, rows that lie apart) through one small buffer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from shardwright.checkpoint.folder import Entry
from shardwright.checkpoint.layout import Box
from shardwright.errors import CheckpointError

SLICE_BYTES = 4 * 2**20  # the most host memory that reading takes; small enough for the processor's cache
_PAGE = 4096  # bytes that the kernel reads at least


class SliceReader:
    """Reads boxes of the tensors in a folder. Made by :func:`open_slices`.

    Attributes:
        bytes_read: from the files so far.
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry]) -> None:
        self.bytes_read = 0
        self._path = path
        self._entries = entries
        self._open: tuple[str, int] | None = None
        self._buffer = torch.empty(SLICE_BYTES, dtype=torch.uint8)

    def read(self, name: str, box: Box, into: Tensor) -> None:
        """A box of the tensor ``name``, not larger than those of :func:`split_box`, into a tensor of its shape.

        Raises:
            CheckpointError: the file has become shorter since it was opened.
            OSError: it cannot be read (any more).
        """
        entry = self._entries[name]
        wide = _without_small_gaps(box, entry.shape, entry.dtype.itemsize)
        if wide == box and into.is_cpu and into.dtype is entry.dtype and into.is_contiguous():
            self._read_bytes(entry, box, into.detach().reshape(-1).view(torch.uint8))
            return
        sizes = [part.stop - part.start for part in wide]
        values = self._buffer[: prod(sizes) * entry.dtype.itemsize]
        self._read_bytes(entry, wide, values)
        inside = [slice(part.start - w.start, part.stop - w.start) for part, w in zip(box, wide, strict=True)]
        into.copy_(values.view(entry.dtype).view(sizes)[tuple(inside)])

    def whole(self, name: str) -> Tensor:
        """All of the tensor ``name``, in memory of its own."""
        entry = self._entries[name]
        whole = torch.empty(entry.shape, dtype=entry.dtype)
        for box in split_box(tuple(slice(0, size) for size in entry.shape), entry.shape, entry.dtype.itemsize):
            self.read(name, box, whole[box])
        return whole

    def close(self) -> None:
        if self._open is not None:
            os.close(self._open[1])
            self._open = None

    def _read_bytes(self, entry: Entry, box: Box, into: Tensor) -> None:
        """The values of ``box``, one after the other, into ``into`` (bytes, 1-D)."""
        file = self._file(entry.file)
        memory = into.numpy().data
        starts, length = _runs(box, entry.shape)
        size = length * entry.dtype.itemsize
        for i, start in enumerate(starts):
            rest, at = memory[i * size : (i + 1) * size], entry.offset + start * entry.dtype.itemsize
            while rest:
                got = os.preadv(file, [rest], at)
                if not got:
                    raise CheckpointError(
                        f"{self._path / entry.file} ends at byte {at:,}, but was longer when it was opened. Something "
                        "is writing to it; fetch or copy it again."
                    )
                rest, at = rest[got:], at + got
        self.bytes_read += len(memory)

    def _file(self, name: str) -> int:
        if self._open is None or self._open[0] != name:
            self.close()
            self._open = (name, os.open(self._path / name, os.O_RDONLY | os.O_CLOEXEC))
        return self._open[1]


@contextmanager
def open_slices(path: Path, entries: Mapping[str, Entry]) -> Iterator[SliceReader]:
    """A reader of the tensors ``entries`` of the folder ``path``, closed at the end."""
    reader = SliceReader(path, entries)
    try:
        yield reader
    finally:
        reader.close()


def split_box(box: Box, shape: Sequence[int], itemsize: int) -> list[Box]:
    """``box`` of an array of ``shape`` in pieces, cut along its first dims; an empty box gives none.

    What is read for a piece, small gaps between its rows included, takes no more than ``SLICE_BYTES``.
    """
    sizes = [part.stop - part.start for part in box]
    if 0 in sizes:
        return []
    total = prod(part.stop - part.start for part in _without_small_gaps(box, shape, itemsize)) * itemsize
    if total <= SLICE_BYTES:
        return [box]
    dim = next(i for i, size in enumerate(sizes) if size > 1)
    rows = max(1, SLICE_BYTES * sizes[dim] // total)
    first, stop = box[dim].start, box[dim].stop
    cuts = [slice(start, min(start + rows, stop)) for start in range(first, stop, rows)]
    return [piece for cut in cuts for piece in split_box((*box[:dim], cut, *box[dim + 1 :]), shape, itemsize)]


def _without_small_gaps(box: Box, shape: Sequence[int], itemsize: int) -> Box:
    """``box``, in the dims whose rows lie less than a page apart widened to the whole dim: one read instead of many."""
    wide = list(box)
    inner = itemsize
    for dim in reversed(range(len(box))):
        gap = (shape[dim] - (box[dim].stop - box[dim].start)) * inner
        rows = prod(part.stop - part.start for part in box[:dim])
        if gap >= _PAGE or (gap and rows == 1):
            break
        wide[dim] = slice(0, shape[dim])
        inner *= shape[dim]
    return tuple(wide)


def _runs(box: Box, shape: Sequence[int]) -> tuple[list[int], int]:
    """Where the elements of ``box`` lie one after the other: the first of every such run, and the length of each."""
    sizes = [part.stop - part.start for part in box]
    apart = max((dim for dim in range(len(box)) if sizes[dim] != shape[dim]), default=0)  # whole in the dims after it
    strides = [prod(shape[dim + 1 :]) for dim in range(len(box))]
    starts = [sum(part.start * stride for part, stride in zip(box, strides, strict=True))]
    for size, stride in zip(sizes[:apart], strides[:apart], strict=True):
        starts = [start + i * stride for start in starts for i in range(size)]
    return starts, prod(sizes[apart:])
