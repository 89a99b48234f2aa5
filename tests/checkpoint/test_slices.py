"""Boxes of safetensors files against the tensors that were written: every layout, every dtype, no byte too many."""

from __future__ import annotations

import os
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from shardwright.checkpoint.folder import open_folder
from shardwright.checkpoint.layout import Box
from shardwright.checkpoint.slices import SLICE_BYTES, open_slices, split_box
from shardwright.errors import CheckpointError

PAGE = 4096
SHAPES = {"scalar": (), "row": (7,), "small": (6, 5, 4), "wide": (5, 3000), "thin": (3, 2000, 3), "none": (3, 0)}
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn)


def _value(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (torch.arange(prod(shape)).reshape(shape) % 101).to(dtype)


VALUES = {f"{name} {dtype}": _value(shape, dtype) for name, shape in SHAPES.items() for dtype in DTYPES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slices")
    save_file(VALUES, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _box(data: st.DataObject, shape: tuple[int, ...]) -> Box:
    starts = [data.draw(st.integers(0, size)) for size in shape]
    return tuple(slice(a, data.draw(st.integers(a, size))) for a, size in zip(starts, shape, strict=True))


def _target(data: st.DataObject, value: Tensor) -> Tensor:
    """A tensor to read into: in another dtype, or with its rows or its elements apart, or as it should be."""
    kind = data.draw(st.sampled_from(["same", "dtype", "apart", "turned"]))
    if kind == "apart" and value.ndim:
        return torch.zeros((*value.shape[:-1], value.shape[-1] + 3), dtype=value.dtype)[..., 1:-2]
    if kind == "turned":
        return torch.zeros(value.shape[::-1], dtype=value.dtype).permute([*reversed(range(value.ndim))])
    return torch.zeros(value.shape, dtype=torch.float64 if kind == "dtype" else value.dtype)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(list(VALUES)))
def test_any_box_into_any_tensor(folder: Path, data: st.DataObject, name: str) -> None:
    whole = VALUES[name]
    box = _box(data, tuple(whole.shape))
    expected = whole[box]
    target = _target(data, expected)
    with open_slices(folder, open_folder(folder)) as reader:
        for piece in split_box(box, whole.shape, whole.element_size()):
            inside = tuple(slice(p.start - b.start, p.stop - b.start) for p, b in zip(piece, box, strict=True))
            reader.read(name, piece, target[inside])
        assert target.to(torch.float64).equal(expected.to(torch.float64))
        assert reader.whole(name).to(torch.float64).equal(whole.to(torch.float64))


@given(st.data(), st.lists(st.integers(1, 5000), min_size=1, max_size=3), st.sampled_from([1, 2, 4, 8]))
def test_boxes_are_cut_into_pieces_that_fit(data: st.DataObject, shape: list[int], itemsize: int) -> None:
    assume(prod(shape) < 2**31)
    box = _box(data, tuple(shape))
    pieces = split_box(box, shape, itemsize)
    sizes = [[part.stop - part.start for part in piece] for piece in pieces]
    assert all(prod(size) * itemsize <= SLICE_BYTES for size in sizes)
    assert sum(map(prod, sizes)) == prod(part.stop - part.start for part in box)


@pytest.mark.parametrize(
    ("shape", "box", "dtype", "read"),
    [
        ((64, 4096), (slice(0, 64), slice(2048, 4096)), torch.bfloat16, 64 * PAGE),  # rows a page apart: only they
        ((64, 4096), (slice(0, 64), slice(2049, 4096)), torch.bfloat16, 64 * (PAGE - 2)),
        ((64, 4096), (slice(0, 64), slice(2047, 4096)), torch.bfloat16, 64 * 2 * PAGE),  # nearer: all of it
        ((64, 4096), (slice(3, 9), slice(0, 4096)), torch.bfloat16, 6 * 2 * PAGE),
        ((64, 4096), (slice(3, 4), slice(7, 9)), torch.bfloat16, 4),  # one row has no gaps
        ((64, 400), (slice(3, 4), slice(7, 9)), torch.bfloat16, 4),
        ((4, 64, 64), (slice(0, 4), slice(0, 32), slice(0, 64)), torch.bfloat16, 4 * 32 * 128),
        ((4, 64, 64), (slice(1, 4), slice(0, 33), slice(0, 32)), torch.bfloat16, 3 * 64 * 128),
    ],
)
def test_bytes_that_are_read(tmp_path: Path, shape: tuple[int, ...], box: Box, dtype: torch.dtype, read: int) -> None:
    save_file({"w": _value(shape, dtype)}, tmp_path / "model.safetensors")
    into = torch.zeros([part.stop - part.start for part in box], dtype=dtype)
    with open_slices(tmp_path, open_folder(tmp_path)) as reader:
        before = _read_by_this_process()
        reader.read("w", box, into)
        assert reader.bytes_read == read
        assert _read_by_this_process() - before in range(read, read + 1000)  # and what it takes to ask
    assert into.equal(_value(shape, dtype)[box])


def _read_by_this_process() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"a": torch.ones(2000), "b": torch.ones(2000)}, tmp_path / "model.safetensors")
    with open_slices(tmp_path, open_folder(tmp_path)) as reader:
        os.truncate(tmp_path / "model.safetensors", (tmp_path / "model.safetensors").stat().st_size - 4)
        reader.read("a", (slice(0, 2000),), torch.empty(2000, dtype=dtype))
        with pytest.raises(CheckpointError, match=r"model\.safetensors ends at byte"):
            reader.read("b", (slice(0, 2000),), torch.empty(2000, dtype=dtype))
