"""``shard_batch``: batches that are split over the context-parallel ranks before the model sees them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardwright.distributed.apply.guards.same_calls import digest
from shardwright.distributed.mesh import axis
from shardwright.distributed.runtime import collectives as c
from shardwright.distributed.runtime.context import parts
from shardwright.distributed.runtime.context.base import Meshes
from shardwright.distributed.runtime.context.parts import Split
from shardwright.distributed.runtime.context.sharded import ContextSharded, context_sharded
from shardwright.errors import ConfigError

_LEADING = ("input_ids", "inputs_embeds")  # whose second dim is the sequence, before any other tensor's
_WORDS = 4  # 8 bytes each, of a digest that is compared


def shard_batch(
    batch: Mapping[str, Any], mesh: DeviceMesh, *, already_split: bool = False, cp_mesh_name: str = "cp"
) -> dict[str, Any]:
    """``batch`` with this rank's part of every sequence, for a model that was parallelized on ``mesh``.

    Every tensor ``[batch, positions, ...]`` (position ids of several axes: ``[axes, batch, positions]``) becomes a
    DTensor that has the whole shape and this rank's part. Give these to the model in the place of whole ones, or to a
    loss of your own beside ``model(...).logits``. Anything else stays as it is. All of it is on the mesh's device
    afterwards. A batch that is too short to give every rank a position stays whole.

    The number of positions is the second dim of ``input_ids``, of ``inputs_embeds``, or of the first tensor that has
    one. Positions count from the beginning of the whole sequence, and labels are those of the whole, not shifted.

    Args:
        batch: the whole batch, equal on the ranks of a context-parallel group.
        already_split: ``batch`` has this rank's part of the sequences already: the ``rank``-th of consecutive chunks
            in the sizes of ``torch.chunk``, as some loaders deal them out.

    Raises:
        ConfigError: on every rank of the group: their batches differ (or, with ``already_split``, are one batch, or
            chunks in other sizes), or the batch was split by this function before.
    """
    cp = axis(mesh, cp_mesh_name)
    if again := [name for name, x in batch.items() if isinstance(x, ContextSharded)]:
        raise ConfigError(f"shard_batch was given {again[0]}, which is split already: hand it to the model as it is.")
    if cp.size() == 1:
        return dict(batch)
    dealt = _Dealt(batch, cp, already_split)
    return {name: dealt.part(x) if isinstance(x, Tensor) else x for name, x in batch.items()}


@dataclass(frozen=True)
class _Seen:
    """What the ranks of a group were given: a row for each rank.

    Attributes:
        forms: digests of everything but the values and the number of positions of what is dealt out.
        values: digests of the tensors whose number of positions counts.
        lengths: how many positions they have.
    """

    forms: list[list[int]]
    values: list[list[int]]
    lengths: list[int]


class _Dealt:
    """How the tensors of a batch are dealt out."""

    def __init__(self, batch: Mapping[str, Any], cp: DeviceMesh, already_split: bool) -> None:
        self.device, self.meshes, self.already_split = cp.device_type, Meshes(cp, None), already_split
        leading = _leading(batch)
        self.rows, self.length = batch[leading].shape[:2]
        group = self.meshes.group
        seen = self._exchanged(batch, leading, group) if dist.get_backend(cp.get_group()) != "fake" else None
        if already_split:
            lengths = seen.lengths if seen is not None else [self.length] * group.size
            self.split = Split.even(group, 1, sum(lengths), inside=False)
            if seen is not None:
                self._check_parts(seen, leading)
        else:
            self.split = Split.even(group, 1, self.length, inside=False)
            if seen is not None:
                _check_same(seen)

    def part(self, x: Tensor) -> Tensor:
        dim = self._dim(x)
        if dim is None or min(end - start for start, end in self.split.bounds) == 0:
            return x.to(self.device)
        split = self.split.at(dim)
        mine = x if self.already_split else parts.part(x, split)
        return context_sharded(mine.to(self.device), split, self.meshes)

    def _dim(self, x: Tensor) -> int | None:
        """The dim of ``x`` that has an item for every position."""
        found = (dim for dim in (1, 2) if x.shape[dim - 1 : dim + 1] == (self.rows, self.length))
        return next(found, None)

    def _exchanged(self, batch: Mapping[str, Any], leading: str, group: c.Group) -> _Seen:
        """A collective of a few numbers."""
        forms, values = self._form(batch), digest(batch[leading], floats=True)
        mine = torch.tensor([*_words(forms), *_words(values), self.length], device=self.device)
        rows = c.all_gather(mine.unsqueeze(0), 0, group.size, group).tolist()
        return _Seen(
            [row[:_WORDS] for row in rows], [row[_WORDS : 2 * _WORDS] for row in rows], [row[-1] for row in rows]
        )

    def _form(self, batch: Mapping[str, Any]) -> str:
        names, others = [], []
        for name, x in sorted(batch.items()):
            dim = self._dim(x) if self.already_split and isinstance(x, Tensor) else None
            names.append(name if dim is None else f"{name} {x.dtype} {x.shape[:dim]} {x.shape[dim + 1 :]}")
            if dim is None:
                others.append(x)
        return hashlib.sha256(f"{names} {digest(others)}".encode()).hexdigest()

    def _check_parts(self, seen: _Seen, leading: str) -> None:
        if any(form != seen.forms[0] for form in seen.forms):
            raise ConfigError(
                "shard_batch(already_split=True) was given batches of different forms on the ranks of a "
                "context-parallel group. Their tensors must have equal names, dtypes and shapes, but for the number of "
                "positions, and be equal where they have no positions."
            )
        if all(value == seen.values[0] for value in seen.values):
            raise ConfigError(
                f"shard_batch(already_split=True) was given the same {leading} of {self.length} positions on all "
                f"{len(seen.values)} ranks of a context-parallel group: a whole batch. Leave already_split out, or "
                "give each rank its part."
            )
        expected = [end - start for start, end in self.split.bounds]
        if seen.lengths != expected:
            raise ConfigError(
                f"shard_batch(already_split=True) was given {seen.lengths} positions by the ranks of a "
                f"context-parallel group. Chunks of {self.split.length} positions must have the sizes {expected}, "
                "which are those of torch.chunk."
            )


def _check_same(seen: _Seen) -> None:
    both = [form + value for form, value in zip(seen.forms, seen.values, strict=True)]
    if differing := [rank for rank, found in enumerate(both) if found != both[0]]:
        raise ConfigError(
            f"shard_batch was given different batches on ranks 0 and {differing[0]} of a context-parallel group. "
            "Choose a rank's batch by its place among the data-parallel ranks (mesh['dp'].get_local_rank()). If every "
            "rank has its part of the sequences already, pass already_split=True."
        )


def _leading(batch: Mapping[str, Any]) -> str:
    tensors = [name for name, x in batch.items() if isinstance(x, Tensor) and x.ndim > 1]
    for name in (*_LEADING, *tensors):
        if name in tensors:
            return name
    raise ConfigError(
        f"shard_batch was given {sorted(batch)}, and found no tensor [batch, positions, ...] among them to split."
    )


def _words(hexadecimal: str) -> list[int]:
    """A digest as numbers that fit a tensor."""
    return [int(hexadecimal[at : at + 15], 16) for at in range(0, 15 * _WORDS, 15)]
