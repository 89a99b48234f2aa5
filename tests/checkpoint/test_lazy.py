"""Lazy tensors against real ones: the same ops, the same values, for every box that is asked for."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardwright.checkpoint.layout import Box
from shardwright.checkpoint.lazy import LazyTensor, NotLazyError

ENTRIES = {name: torch.arange(24).reshape(4, 6) + 100 * i for i, name in enumerate("abcd")}


def _value(lazy: LazyTensor, box: Box) -> Tensor:
    """What reading ``box`` source by source gives; -1 where nothing was read."""
    out = torch.full([part.stop - part.start for part in box], -1)
    for source in lazy.sources:
        mine = source.within(box)
        if mine is not None:
            at = tuple(slice(p.start - b.start, p.stop - b.start) for p, b in zip(mine.box(), box, strict=True))
            mine.as_entry(out[at]).copy_(ENTRIES[mine.name][mine.source_box()])
    return out


def _apply(draw: st.DrawFn, values: list[Any], ndim: int) -> tuple[list[Any], int]:
    """One op on every one of ``values`` (a lazy and a real one go through the same calls)."""
    op = draw(st.sampled_from(["stack", "cat", "chunk", "transpose", "unsqueeze", "split"]))
    dim = draw(st.integers(0, ndim - 1))
    other = draw(st.integers(0, ndim - 1))
    pick = draw(st.integers(0, 1))
    ops = {
        "stack": lambda x: torch.stack([x, x], dim=dim),
        "cat": lambda x: torch.cat([x, x], dim=dim),
        "chunk": lambda x: torch.chunk(x, 2, dim=dim)[pick if x.shape[dim] > 1 else 0],
        "transpose": lambda x: torch.transpose(x, dim0=dim, dim1=other).contiguous(),
        "unsqueeze": lambda x: x.unsqueeze(dim),
        "split": lambda x: x.split(1, dim)[x.shape[dim] - 1].squeeze(dim) if ndim > 1 else x,
    }
    return [ops[op](value) for value in values], ndim + {"stack": 1, "unsqueeze": 1, "split": -(ndim > 1)}.get(op, 0)


@st.composite
def _cases(draw: st.DrawFn) -> tuple[LazyTensor, Tensor, Box]:
    names = draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=3))
    values: list[Any] = [
        torch.cat([LazyTensor.of(name, (4, 6)) for name in names]),
        torch.cat([ENTRIES[name] for name in names]),
    ]
    ndim = 2
    for _ in range(draw(st.integers(0, 4))):
        values, ndim = _apply(draw, values, ndim)
    lazy, real = values
    starts = [draw(st.integers(0, size - 1)) for size in real.shape]
    box = tuple(slice(a, draw(st.integers(a + 1, size))) for a, size in zip(starts, real.shape, strict=True))
    return lazy, real, box


@settings(max_examples=200, deadline=None)
@given(_cases())
def test_any_chain_of_ops_and_any_box(case: tuple[LazyTensor, Tensor, Box]) -> None:
    lazy, real, box = case
    assert lazy.shape == real.shape
    assert _value(lazy, box).equal(real[box])


@pytest.mark.parametrize("op", [lambda x: x + 1, lambda x: x.reshape(24), torch.exp, lambda x: x[0]])
def test_what_computes_is_not_lazy(op: Any) -> None:
    with pytest.raises((NotLazyError, TypeError)):
        op(LazyTensor.of("a", (4, 6)))


@settings(max_examples=100, deadline=None)
@given(_cases(), st.data())
def test_a_part_cut_in_the_file_is_the_same_part(case: tuple[LazyTensor, Tensor, Box], data: st.DataObject) -> None:
    lazy, real, _ = case
    source = data.draw(st.sampled_from(lazy.sources))
    whole = source.source_box()
    starts = [data.draw(st.integers(part.start, part.stop - 1)) for part in whole]
    box = tuple(slice(a, data.draw(st.integers(a + 1, part.stop))) for a, part in zip(starts, whole, strict=True))
    piece = source.cut(box)
    assert piece.source_box() == box
    assert piece.as_entry(real[piece.box()]).equal(ENTRIES[piece.name][box])


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_what_is_shown_turned_is_turned_back(order: tuple[int, ...]) -> None:
    entry = torch.arange(24).reshape(2, 3, 4)
    (source,) = torch.permute(LazyTensor.of("a", (2, 3, 4)), order).sources
    assert source.as_entry(entry.permute(order)).equal(entry)
