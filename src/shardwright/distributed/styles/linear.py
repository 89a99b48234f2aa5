"""Column- and row-parallel linear layers, in every form that plans use.

A column-parallel layer *reads* a replicated tensor and gives this rank's slice of its output features; a row-parallel
layer takes such a slice and *writes* the sum over the ranks (Shoeybi et al. 2019, "Megatron-LM").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from shardwright.distributed.runtime import collectives as c
from shardwright.distributed.runtime.forward import Around, Forward, attributes_as, local_parameters, parameters_as
from shardwright.distributed.runtime.logits import sharded_logits
from shardwright.distributed.runtime.regions import SEQUENCE_DIM, SequenceLength, SharedInput
from shardwright.distributed.styles.base import Style
from shardwright.errors import PlanError


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer keeps its weight as ``[in, out]``: GPT-2's ``Conv1D``, which names its output width ``nf``."""
    return "nf" in module.__dict__


def feature_dim(module: nn.Module, parameter: str, *, out: bool) -> int:
    """The dim of a weight (or bias) along which its output (or input) features lie.

    ``nn.Linear`` keeps ``[out, in]``, ``Conv1D`` ``[in, out]``, batched experts ``[experts, out, in]``.
    """
    ndim = parameter_shape(module, parameter)
    if len(ndim) < 2:
        return 0
    return len(ndim) - (1 if out == is_transposed(module) else 2)


def parameter_shape(module: nn.Module, parameter: str) -> torch.Size:
    param = module._parameters[parameter]
    assert param is not None
    return param.shape


def features(module: nn.Module, *, out: bool) -> int:
    """Output (or input) features of a linear layer."""
    return parameter_shape(module, "weight")[feature_dim(module, "weight", out=out)]


def _require_linear(module: nn.Module, name: str, style: str) -> None:
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 2:
        raise PlanError(
            f"{style!r} is for linear layers, but {name} is a {type(module).__name__} "
            + ("without a weight." if weight is None else f"whose weight has shape {tuple(weight.shape)}.")
        )


def reader_input(x: Tensor, group: c.Group, shared: SharedInput, length: SequenceLength | None) -> Tensor:
    """The input of a column-parallel layer, whole and ready for rank-local work.

    Args:
        length: set for a layer directly below a sequence-parallel block, whose input is a chunk of the sequence.
    """
    x = shared.behind(x)
    if isinstance(x, DTensor):
        if x.placements == (Shard(SEQUENCE_DIM),):
            chunk, length_here = x.to_local(), x.shape[SEQUENCE_DIM]
            return c.gather(chunk, SEQUENCE_DIM, length_here, group, partial_grad=True)
        x = x.full_tensor()
    if length is not None:
        return shared.gathered(x, lambda: length.gather(x, group, partial_grad=True))
    return shared.copy(x, group)


class _ColwiseForward(Around):
    def __init__(self, style: Colwise, module: nn.Module, mesh: DeviceMesh) -> None:
        self.group = c.Group.of(mesh)
        self.mesh = mesh
        self.width = features(module, out=True)
        self.style_output = style.output
        self.shared = style.shared
        self.length = style.length
        self.heads = style.heads

    def _local(self, module: nn.Module) -> dict[str, Tensor]:
        return local_parameters(module)

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, *others = args
        x = reader_input(x, self.group, self.shared, self.length)
        tensors = self._local(module)
        local = {"nf": tensors["weight"].shape[-1]} if is_transposed(module) else {}
        with parameters_as(module, tensors), attributes_as(module, local):
            y = forward(x, *others, **kwargs)
        if self.style_output == "logits":
            return sharded_logits(y, self.width, self.mesh)
        if self.style_output == "gather":
            return c.gather(y, y.ndim - 1, self.width, self.group, partial_grad=False)
        if self.style_output == "heads":
            whole = c.gather(y, y.ndim - 1, self.width, self.group, partial_grad=True)
            return whole.index_select(-1, torch.tensor(self.heads[self.group.rank], device=whole.device))
        return y


class _PackedColwiseForward(_ColwiseForward):
    def __init__(self, style: PackedColwise, module: nn.Module, mesh: DeviceMesh) -> None:
        super().__init__(style, module, mesh)
        self.pieces = style.pieces

    def _local(self, module: nn.Module) -> dict[str, Tensor]:
        tensors = super()._local(module)
        if "bias" in tensors:
            pieces = tensors["bias"].unflatten(0, (self.pieces, self.group.size, -1))
            tensors["bias"] = pieces.select(1, self.group.rank).flatten()
        return tensors


class Colwise(Style, ColwiseParallel):
    """Cut on the output features.

    Args:
        output: what becomes of this rank's slice of the output. ``"slice"``: handed on as it is; ``"gather"``: made
            whole; ``"logits"``: a DTensor sharded on the vocabulary; ``"heads"``: made whole, then each rank takes the
            features listed for it in ``heads``.
        shared: the region's shared input; None where this layer is the only reader.
        length: for a layer directly below a sequence-parallel block, that block's sequence length.
    """

    name = "colwise"

    def __init__(
        self,
        *,
        output: str = "slice",
        shared: SharedInput | None = None,
        length: SequenceLength | None = None,
        heads: tuple[tuple[int, ...], ...] = (),
    ) -> None:
        ColwiseParallel.__init__(
            self,
            output_layouts=Replicate() if output == "gather" else Shard(-1),
            use_local_output=output != "logits",
        )
        self.output = output
        self.shared = shared or SharedInput()
        self.length = length
        self.heads = heads

    def check(self, module: nn.Module, name: str, size: int) -> None:
        _require_linear(module, name, self.name)

    def placement(self, module: nn.Module, parameter: str) -> Placement:
        return Shard(feature_dim(module, parameter, out=True))

    def around(self, module: nn.Module, mesh: DeviceMesh) -> Around:
        return _ColwiseForward(self, module, mesh)


class PackedColwise(Colwise):
    """Column-parallel for a weight that packs ``pieces`` equal ones (gate|up, q|k|v): each piece is cut.

    The bias stays whole and every rank takes its part of it, because FSDP2 cannot cut a vector that is cut in pieces
    already; its gradient is summed over the ranks.
    """

    name = "packed_colwise"

    def __init__(self, *, pieces: int = 2, **options: Any) -> None:
        super().__init__(**options)
        self.pieces = pieces

    def check(self, module: nn.Module, name: str, size: int) -> None:
        super().check(module, name, size)
        check_pieces(name, features(module, out=True), self.pieces, size)

    def around(self, module: nn.Module, mesh: DeviceMesh) -> Around:
        return _PackedColwiseForward(self, module, mesh)

    def placement(self, module: nn.Module, parameter: str) -> Placement:
        if len(parameter_shape(module, parameter)) == 1:
            return Replicate()
        return _StridedShard(feature_dim(module, parameter, out=True), split_factor=self.pieces)


def check_pieces(name: str, width: int, pieces: int, size: int) -> None:
    """Raise PlanError unless each of ``pieces`` equal pieces of ``width`` can be cut into ``size`` equal parts."""
    if width % pieces:
        raise PlanError(f"{name} packs {pieces} pieces, but its width {width} is not a multiple of {pieces}.")
    if (width // pieces) % size:
        fits = max(n for n in range(1, size + 1) if (width // pieces) % n == 0)
        raise PlanError(
            f"{name} packs {pieces} pieces of {width // pieces} features each, which {size} tensor-parallel ranks do "
            f"not divide. The largest tp up to {size} that does is {fits}."
        )


class _RowwiseForward(Around):
    def __init__(self, style: Rowwise, mesh: DeviceMesh) -> None:
        self.group = c.Group.of(mesh)
        self.split_input = style.split_input
        self.length = style.length
        self.shared = style.shared

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, *others = args
        if self.split_input:
            x = c.scatter(x, x.ndim - 1, self.group)
        tensors: dict[str, Any] = local_parameters(module)
        bias = tensors.get("bias")
        if bias is not None:
            # Every rank would add it; it belongs to the sum.
            tensors["bias"] = torch.zeros_like(bias) if is_transposed(module) else None
        with parameters_as(module, tensors):
            y = forward(x, *others, **kwargs)
        self.shared.written = True
        y = self._reduced(y)
        return y if bias is None else y + bias.to(y.dtype)  # which autocast has lowered

    def _reduced(self, y: Tensor) -> Tensor:
        if self.length is None:
            return c.reduce_from_region(y, self.group)
        return self.length.split(y, self.group, partial=True)


class Rowwise(Style, RowwiseParallel):
    """Cut on the input features; the output is the sum over the ranks, the bias added once.

    Args:
        split_input: the input is whole and each rank takes its slice of it.
        length: leave the sum split along the sequence, which is so long in this block (sequence parallelism).
        shared: the region's shared input, which is told that the region has been written.
    """

    name = "rowwise"

    def __init__(
        self, *, split_input: bool = False, length: SequenceLength | None = None, shared: SharedInput | None = None
    ) -> None:
        RowwiseParallel.__init__(
            self,
            input_layouts=Replicate() if split_input else Shard(-1),
            output_layouts=Replicate() if length is None else Shard(SEQUENCE_DIM),
        )
        self.split_input = split_input
        self.length = length
        self.shared = shared or SharedInput()

    def check(self, module: nn.Module, name: str, size: int) -> None:
        _require_linear(module, name, self.name)

    def placement(self, module: nn.Module, parameter: str) -> Placement:
        return Replicate() if parameter == "bias" else Shard(feature_dim(module, parameter, out=False))

    def around(self, module: nn.Module, mesh: DeviceMesh) -> Around:
        return _RowwiseForward(self, mesh)


class PackedRowwise(Rowwise):
    """Row-parallel for a weight whose input features pack ``pieces`` equal ones: each piece is cut."""

    name = "packed_rowwise"

    def __init__(self, *, pieces: int = 2, **options: Any) -> None:
        super().__init__(**options)
        self.pieces = pieces

    def check(self, module: nn.Module, name: str, size: int) -> None:
        super().check(module, name, size)
        check_pieces(name, features(module, out=False), self.pieces, size)

    def placement(self, module: nn.Module, parameter: str) -> Placement:
        whole = super().placement(module, parameter)
        return _StridedShard(whole.dim, split_factor=self.pieces) if isinstance(whole, Shard) else whole
