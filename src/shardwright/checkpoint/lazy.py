"""A tensor that is only a list of where its parts come from.

transformers turns the tensors of a checkpoint into those of a model with torch ops (stack the experts, concatenate
gate and up, transpose). Given :class:`LazyTensor` s, the same code only moves boxes around, and what comes out says
which box of which file entry every part of a parameter is: so a rank can read the part it owns and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from shardwright.checkpoint.layout import Box


class NotLazyError(TypeError):
    """An op that does more than move boxes."""


@dataclass(frozen=True)
class Source:
    """A box of a file entry, as it appears in a lazy tensor.

    Attributes:
        name: the entry.
        start: the first index of the box, per dim of the entry.
        size: its extent, per dim of the entry.
        dims: for every dim of the lazy tensor the dim of the entry it shows, or None for a new dim of size 1. Dims of
            the entry that are not shown have size 1.
        at: where the box begins in the lazy tensor.
    """

    name: str
    start: tuple[int, ...]
    size: tuple[int, ...]
    dims: tuple[int | None, ...]
    at: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the box as the lazy tensor shows it."""
        return tuple(1 if dim is None else self.size[dim] for dim in self.dims)

    def within(self, box: Box) -> Source | None:
        """The part of this source that lies in ``box`` of the lazy tensor; None when there is none."""
        start, size, at = list(self.start), list(self.size), list(self.at)
        for i, (dim, extent, wanted) in enumerate(zip(self.dims, self.shape, box, strict=True)):
            first = max(self.at[i], wanted.start)
            stop = min(self.at[i] + extent, wanted.stop)
            if stop <= first:
                return None
            at[i] = first
            if dim is not None:
                start[dim] += first - self.at[i]
                size[dim] = stop - first
        return Source(self.name, tuple(start), tuple(size), self.dims, tuple(at))

    def cut(self, box: Box) -> Source:
        """The part of this source that is ``box`` of the entry, which lies in this source's own box."""
        shifts = [0 if dim is None else box[dim].start - self.start[dim] for dim in self.dims]
        return Source(
            self.name,
            tuple(part.start for part in box),
            tuple(part.stop - part.start for part in box),
            self.dims,
            tuple(first + shift for first, shift in zip(self.at, shifts, strict=True)),
        )

    def moved(self, dim: int, distance: int) -> Source:
        return replace(self, at=(*self.at[:dim], self.at[dim] + distance, *self.at[dim + 1 :]))

    def reordered(self, order: Sequence[int]) -> Source:
        return replace(self, dims=tuple(self.dims[i] for i in order), at=tuple(self.at[i] for i in order))

    def with_new_dim(self, dim: int) -> Source:
        return replace(self, dims=(*self.dims[:dim], None, *self.dims[dim:]), at=(*self.at[:dim], 0, *self.at[dim:]))

    def without_dim(self, dim: int) -> Source:
        return replace(self, dims=self.dims[:dim] + self.dims[dim + 1 :], at=self.at[:dim] + self.at[dim + 1 :])

    def source_box(self) -> Box:
        return tuple(slice(first, first + extent) for first, extent in zip(self.start, self.size, strict=True))

    def box(self) -> Box:
        """Where it lies in the lazy tensor."""
        return tuple(slice(first, first + extent) for first, extent in zip(self.at, self.shape, strict=True))

    def as_entry(self, shown: Tensor) -> Tensor:
        """``shown`` (this box, as the lazy tensor shows it) as the entry has it; a view."""
        dims = [dim for dim in self.dims if dim is not None]
        hidden = [dim for dim in range(len(self.size)) if dim not in dims]
        kept = shown[tuple(0 if dim is None else slice(None) for dim in self.dims)]
        all_dims = [*dims, *hidden]
        return kept[(..., *[None] * len(hidden))].permute([all_dims.index(dim) for dim in range(len(self.size))])


class LazyTensor:
    """A tensor made of :class:`Source` s, which cover it without overlap. Knows the torch ops that only move boxes."""

    def __init__(self, shape: Iterable[int], sources: Iterable[Source]) -> None:
        self.shape = torch.Size(shape)
        self.sources = tuple(sources)

    @classmethod
    def of(cls, name: str, shape: Sequence[int]) -> LazyTensor:
        """All of the entry ``name``."""
        ndim = len(shape)
        return cls(shape, [Source(name, (0,) * ndim, tuple(shape), tuple(range(ndim)), (0,) * ndim)])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _OPS:
            raise NotLazyError(f"{func} does more than move boxes.")
        return _OPS[func](*args, **(kwargs or {}))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getattr__(self, name: str) -> Any:
        # The methods of a tensor: those in the table below work, the others end the attempt with one kind of error.
        method = getattr(Tensor, name, None)
        if method not in _OPS:
            raise NotLazyError(f"Tensor.{name} does more than move boxes.")
        return lambda *args, **kwargs: _OPS[method](self, *args, **kwargs)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def contiguous(self) -> LazyTensor:
        return self

    def narrow(self, dim: int, start: int, length: int) -> LazyTensor:
        dim %= self.ndim
        box = tuple(slice(start, start + length) if i == dim else slice(0, n) for i, n in enumerate(self.shape))
        parts = (source.within(box) for source in self.sources)
        shape = (*self.shape[:dim], length, *self.shape[dim + 1 :])
        return LazyTensor(shape, [part.moved(dim, -start) for part in parts if part is not None])


def _cat(tensors: Sequence[LazyTensor], dim: int = 0) -> LazyTensor:
    dim %= tensors[0].ndim
    sources: list[Source] = []
    length = 0
    for tensor in tensors:
        if not isinstance(tensor, LazyTensor) or _without(tensor.shape, dim) != _without(tensors[0].shape, dim):
            raise NotLazyError("Only lazy tensors whose other dims are equal can be put together.")
        sources += [source.moved(dim, length) for source in tensor.sources]
        length += tensor.shape[dim]
    return LazyTensor((*tensors[0].shape[:dim], length, *tensors[0].shape[dim + 1 :]), sources)


def _without(shape: Sequence[int], dim: int) -> tuple[int, ...]:
    return (*shape[:dim], *shape[dim + 1 :])


def _unsqueeze(tensor: LazyTensor, dim: int) -> LazyTensor:
    dim %= tensor.ndim + 1
    shape = (*tensor.shape[:dim], 1, *tensor.shape[dim:])
    return LazyTensor(shape, [source.with_new_dim(dim) for source in tensor.sources])


def _squeeze(tensor: LazyTensor, dim: int) -> LazyTensor:
    dim %= tensor.ndim
    if tensor.shape[dim] != 1:
        return tensor
    return LazyTensor(_without(tensor.shape, dim), [source.without_dim(dim) for source in tensor.sources])


def _stack(tensors: Sequence[LazyTensor], dim: int = 0) -> LazyTensor:
    return _cat([_unsqueeze(tensor, dim) for tensor in tensors], dim)


def _permute(tensor: LazyTensor, *dims: Any) -> LazyTensor:
    order = [dim % tensor.ndim for dim in (dims[0] if isinstance(dims[0], (tuple, list)) else dims)]
    return LazyTensor([tensor.shape[i] for i in order], [source.reordered(order) for source in tensor.sources])


def _transpose(tensor: LazyTensor, dim0: int, dim1: int) -> LazyTensor:
    order = list(range(tensor.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(tensor, order)


def _split(tensor: LazyTensor, split_size: int | Sequence[int], dim: int = 0) -> tuple[LazyTensor, ...]:
    length = tensor.shape[dim]
    if isinstance(split_size, int):
        split_size = [min(split_size, length - start) for start in range(0, length, split_size)]
    starts = [sum(split_size[:i]) for i in range(len(split_size))]
    return tuple(tensor.narrow(dim, start, size) for start, size in zip(starts, split_size, strict=True))


def _chunk(tensor: LazyTensor, chunks: int, dim: int = 0) -> tuple[LazyTensor, ...]:
    return _split(tensor, -(-tensor.shape[dim] // chunks), dim)


_OPS: dict[Any, Callable[..., Any]] = {
    torch.cat: _cat,
    torch.stack: _stack,
    torch.chunk: _chunk,
    Tensor.chunk: _chunk,
    torch.split: _split,
    Tensor.split: _split,
    torch.squeeze: _squeeze,
    Tensor.squeeze: _squeeze,
    torch.unsqueeze: _unsqueeze,
    Tensor.unsqueeze: _unsqueeze,
    torch.transpose: _transpose,
    Tensor.transpose: _transpose,
    torch.permute: _permute,
    Tensor.permute: _permute,
}
