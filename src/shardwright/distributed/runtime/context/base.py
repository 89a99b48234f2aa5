"""What a tensor that is split over the context-parallel ranks is made of; :mod:`.sharded` says what may be done to it.

It is a DTensor, so that losses, hooks and FSDP2 find the whole shape and autograd as they know them. On every rank
there is a plain tensor inside, this rank's part of the sequence, or a DTensor of the tensor-parallel mesh, of which
each rank of that mesh has a part (the stream under sequence parallelism, logits that are sharded on the vocabulary).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from shardwright._torch import version_of, without_torch_function
from shardwright.distributed.runtime import collectives as c
from shardwright.distributed.runtime.context import parts
from shardwright.distributed.runtime.context.parts import Split
from shardwright.distributed.runtime.context.reach import Reach, reach_of, sends_less
from shardwright.distributed.runtime.implicit import ImplicitDTensor, OwnRules, joined
from shardwright.distributed.runtime.logits import ShardedLogits
from shardwright.distributed.runtime.regions import SequenceSharded
from shardwright.errors import PlanError

T = TypeVar("T", bound="ContextTensor")


class ContextTensor(OwnRules):
    """A DTensor on the ``cp`` mesh, or on ``cp`` x ``tp`` where what is inside is a DTensor on ``tp``.

    Attributes:
        dealt: how the sequence is dealt out to the ``cp`` ranks.
        kind: the class of what is inside; None for a plain tensor.
        meshes: ``cp`` alone, and ``cp`` x ``tp`` where there are tensor-parallel ranks.
    """

    __slots__ = ()
    dealt: Split
    kind: type[ImplicitDTensor] | None
    meshes: Meshes

    @property
    def inside(self) -> Tensor:
        """What this rank has, in the same autograd graph."""
        local = self.to_local()
        if self.kind is None:
            return local
        shape = torch.Size(self.dealt.local if dim == self.dealt.dim else size for dim, size in enumerate(self.shape))
        inner = DTensor.from_local(
            local,
            self.meshes.tp,
            [self.placements[1]],
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )
        inner.__class__ = self.kind
        return inner

    def like(self, inside: Tensor, split: Split) -> Self:
        """Another tensor of which this rank has ``inside``."""
        return make(type(self), inside, split, self.meshes)

    def whole(self) -> Tensor:
        """All of it, as a plain tensor; backward follows :mod:`.parts`. A collective."""
        return parts.whole(joined(self.inside), self.dealt)

    def full_tensor(self, *, grad_placements: Any = None) -> Tensor:
        with without_torch_function():
            return self.whole()


class Context:
    """What the wrapped modules of one model know of each other while they run.

    Attributes:
        active: whether blocks split what they are given; a call with a key-value cache runs on whole sequences.
        in_call: whether the model, or one inside of it, runs.
        split: how the stream of the block that runs is dealt out; None outside of blocks, and where the whole is seen.
        batch: how many sequences there are in it.
    """

    def __init__(self, meshes: Meshes) -> None:
        self.meshes = meshes
        self.active, self.in_call = True, False
        self.split: Split | None = None
        self.batch = 0
        self._wholes: list[tuple[Tensor, Tensor]] = []
        self._noted: dict[int, tuple[Tensor, Split]] | None = None
        self._reaches: list[tuple[weakref.ref[Tensor], int, Split, Reach | None]] = []

    @contextmanager
    def running(self, split: Split | None, batch: int, wholes: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
        """Inside, a block or a part of it runs.

        Args:
            wholes: parts of arguments, and the whole arguments that they were cut from.
        """
        before = self.split, self.batch, self._wholes
        self.split, self.batch, self._wholes = split, batch, wholes
        try:
            yield
        finally:
            self.split, self.batch, self._wholes = before

    @contextmanager
    def called(self, *, active: bool) -> Iterator[None]:
        """Inside, a model runs that was called from outside."""
        self.active, self.in_call = active, True
        try:
            yield
        finally:
            self.active, self.in_call = True, False

    def whole_of(self, x: Tensor) -> Tensor | None:
        """What ``x`` was cut from, where that is known."""
        return next((whole for part, whole in self._wholes if part is x), None)

    def reach(self, mask: Any, kwargs: dict[str, Any], split: Split) -> Reach | None:
        """The keys that the ranks look at, where to exchange these is less than to gather all; else None.

        The layers of a model share their masks: each is looked at once, since a GPU has to be waited for.
        """
        if not isinstance(mask, Tensor) or mask.is_inference():
            return _worth_it(reach_of(mask, kwargs, split), split)
        self._reaches = [entry for entry in self._reaches if entry[0]() is not None]
        for known, version, dealt, reach in self._reaches:
            if known() is mask and version == version_of(mask) and dealt == split:
                return reach
        reach = _worth_it(reach_of(mask, kwargs, split), split)
        self._reaches.append((weakref.ref(mask), version_of(mask), split, reach))
        return reach

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Inside, :meth:`note` remembers what it is told."""
        outermost = self._noted is None
        if outermost:
            self._noted = {}
        try:
            yield
        finally:
            if outermost:
                self._noted = None

    def note(self, x: Tensor, split: Split) -> None:
        """Remember that ``x`` is a part. It is kept until the outermost :meth:`noting` ends."""
        if self._noted is not None:
            self._noted[id(x)] = x, split

    def noted(self, x: Tensor) -> Split | None:
        """What is known of ``x``."""
        found = (self._noted or {}).get(id(x))
        return None if found is None else found[1]


def _worth_it(reach: Reach | None, split: Split) -> Reach | None:
    return reach if reach is not None and sends_less(reach, split) else None


class Meshes:
    """The context-parallel mesh, and what it makes with the tensor-parallel one."""

    def __init__(self, cp: DeviceMesh, both: DeviceMesh | None) -> None:
        self.cp, self.both = cp, both
        self.group = c.Group.of(cp)
        # Made here, and not when it is asked for: in a trace on tensors without values a mesh would not find this rank.
        self._tp = None if both is None or both.mesh_dim_names is None else both[both.mesh_dim_names[1]]

    @property
    def tp(self) -> DeviceMesh:
        assert self._tp is not None
        return self._tp


def make(cls: type[T], inside: Tensor, split: Split, meshes: Meshes) -> T:
    """``inside``, which this rank has of a tensor, as that tensor."""
    kind = type(inside) if isinstance(inside, ImplicitDTensor) else None
    shape = torch.Size(split.total if dim == split.dim else size for dim, size in enumerate(inside.shape))
    placements: list[Any] = [Shard(split.dim)]
    mesh = meshes.cp
    if kind is not None:
        assert isinstance(inside, DTensor)
        assert meshes.both is not None
        placements.append(inside.placements[0])
        mesh, inside = meshes.both, inside.to_local()
    stride = torch.empty(shape, device="meta").stride()
    made: Any = DTensor.from_local(inside.contiguous(), mesh, placements, run_check=False, shape=shape, stride=stride)
    made.__class__ = cls
    made.dealt, made.kind, made.meshes = split, kind, meshes
    return made


def recovered(cls: type[T], x: DTensor, meshes: Meshes) -> T:
    """``x``, which was of ``cls`` until something took its class off (FSDP2 hands modules views of their inputs).

    Raises:
        PlanError: it cannot be told how ``x`` was dealt out.
    """
    if isinstance(x, cls):
        return x
    dim = x.placements[0].dim  # type: ignore[attr-defined]
    split = Split.even(meshes.group, dim, x.shape[dim])
    whole_over_tp = x.device_mesh.ndim == 1
    if whole_over_tp and x.to_local().shape[dim] != split.local:
        raise PlanError(f"A part of a sequence of {x.shape[dim]} was taken before a module of its own FSDP2 unit.")
    kind = None if whole_over_tp else ShardedLogits if x.placements[1].is_shard(x.ndim - 1) else SequenceSharded
    x.__class__ = cls
    found: Any = x
    found.dealt, found.kind, found.meshes = split, kind, meshes
    return found
