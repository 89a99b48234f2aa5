"""Column- and row-parallel layers for weights that pack several equal ones, each of which is cut."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from shardwright._torch import StridedShard
from shardwright.distributed.runtime.forward import Around
from shardwright.distributed.styles.base import Style, written_number
from shardwright.distributed.styles.cuts import Cut, packed
from shardwright.distributed.styles.linear import (
    Colwise,
    ColwiseForward,
    Rowwise,
    feature_dim,
    features,
    parameter_shape,
)
from shardwright.errors import PlanError


class _Packed(Style):
    """What both have: how many pieces there are, in a plan and in a check.

    Attributes:
        packs_output: whether the output features are packed; else the input features.
    """

    packs_output: ClassVar[bool]

    def __init__(self, *, pieces: int = 2) -> None:
        super().__init__()
        self.pieces = pieces

    @classmethod
    def written_options(cls, argument: str) -> dict[str, Any] | None:
        return written_number("pieces", argument)

    def check(self, module: nn.Module, name: str, size: int) -> None:
        super().check(module, name, size)
        _check_pieces(name, features(module, out=self.packs_output), self.pieces, size)


class _PackedColwiseForward(ColwiseForward):
    def __init__(self, style: PackedColwise, module: nn.Module, mesh: DeviceMesh) -> None:
        super().__init__(style, module, mesh)
        self.pieces = style.pieces

    def _local(self, module: nn.Module) -> dict[str, Tensor]:
        tensors = super()._local(module)
        if "bias" in tensors:
            pieces = tensors["bias"].unflatten(0, (self.pieces, self.group.size, -1))
            tensors["bias"] = pieces.select(1, self.group.rank).flatten()
        return tensors


class PackedColwise(_Packed, Colwise):
    """Column-parallel for a weight that packs ``pieces`` equal ones (gate|up, q|k|v): each piece is cut.

    The bias stays replicated and every rank takes its part of it, because FSDP2 cannot cut a vector that is cut in
    pieces already; its gradient is summed over the ranks. ``packed_colwise:3`` in a plan packs three pieces.
    """

    name = "packed_colwise"
    partial_gradients = True
    packs_output = True

    def placement(self, module: nn.Module, parameter: str) -> Placement:
        if len(parameter_shape(module, parameter)) == 1:
            return Replicate()
        return StridedShard(feature_dim(module, parameter, out=True), split_factor=self.pieces)

    def cut_out(self, width: int) -> Cut | None:
        return packed(width, self.pieces)

    def around(self, module: nn.Module, mesh: DeviceMesh) -> Around:
        return _PackedColwiseForward(self, module, mesh)


class PackedRowwise(_Packed, Rowwise):
    """Row-parallel for a weight whose input features pack ``pieces`` equal ones: each piece is cut."""

    name = "packed_rowwise"
    on_whole_input = None
    packs_output = False

    def placement(self, module: nn.Module, parameter: str) -> Placement:
        replicated = super().placement(module, parameter)
        if not isinstance(replicated, Shard):
            return replicated
        return StridedShard(replicated.dim, split_factor=self.pieces)

    def cut_in(self, width: int) -> Cut | None:
        return packed(width, self.pieces)


def _check_pieces(name: str, width: int, pieces: int, size: int) -> None:
    """Raise PlanError unless each of ``pieces`` equal pieces of ``width`` can be cut into ``size`` equal parts."""
    if width % pieces:
        raise PlanError(f"{name} packs {pieces} pieces, but its width {width} is not a multiple of {pieces}.")
    if (width // pieces) % size:
        fits = max(n for n in range(1, size + 1) if (width // pieces) % n == 0)
        raise PlanError(
            f"{name} packs {pieces} pieces of {width // pieces} features each, which {size} tensor-parallel ranks do "
            f"not divide. The largest tp up to {size} that does is {fits}."
        )
