"""Column- and row-parallel linear layers, in every form that plans use.

A column-parallel layer *reads* a replicated tensor and gives this rank's slice of its output features; a row-parallel
layer takes such a slice and *writes* the sum over the ranks (Shoeybi et al. 2019, "Megatron-LM").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.distributed.tensor.placement_types import Placement

from shardwright.distributed.runtime import collectives as c
from shardwright.distributed.runtime.adapted import base_layer
from shardwright.distributed.runtime.forward import Around, Forward, attributes_as, local_parameters, parameters_as
from shardwright.distributed.runtime.logits import sharded_logits
from shardwright.distributed.runtime.regions import SEQUENCE_DIM, SequenceLength, SharedInput
from shardwright.distributed.styles.base import Place, Style
from shardwright.distributed.styles.cuts import Cut, Picked, contiguous
from shardwright.distributed.styles.traffic import Sent, Site, backward, forward
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
    """Output (or input) features of a linear layer, of an adapted one too."""
    layer = base_layer(module)
    return parameter_shape(layer, "weight")[feature_dim(layer, "weight", out=out)]


def _require_linear(module: nn.Module, name: str, style: str) -> None:
    weight = base_layer(module)._parameters.get("weight")
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


class ColwiseForward(Around):
    def __init__(self, style: Colwise, module: nn.Module, mesh: DeviceMesh) -> None:
        self.group = c.Group.of(mesh)
        self.mesh = mesh
        self.width = features(module, out=True)
        self.inside = style.inside
        self.shared = style.shared
        self.length = style.length

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, *others = args
        if not self.inside:
            x = reader_input(x, self.group, self.shared, self.length)
        tensors = self._local(module)
        local = {"nf": tensors["weight"].shape[-1]} if is_transposed(module) else {}
        with parameters_as(module, tensors), attributes_as(module, local):
            y = forward(x, *others, **kwargs)
        return y if self.inside else self._output(y)

    def _local(self, module: nn.Module) -> dict[str, Tensor]:
        return local_parameters(module)

    def _output(self, y: Tensor) -> Tensor:
        """What becomes of this rank's slice of the output."""
        return y


class Colwise(Style, ColwiseParallel):
    """Cut on the output features; the slice is handed on as it is."""

    name = "colwise"
    reads = True
    for_adapted = True
    output_is_slice = True
    rank_local = True

    def __init__(self) -> None:
        ColwiseParallel.__init__(self)

    def specialised(self, place: Place) -> tuple[str, dict[str, Any]] | None:
        if isinstance(base_layer(place.module), nn.Embedding):
            return "embedding_colwise", {}
        return ("colwise_logits", {}) if place.head and type(self) is Colwise else None

    def check(self, module: nn.Module, name: str, size: int) -> None:
        _require_linear(module, name, self.name)

    def placement(self, module: nn.Module, parameter: str) -> Placement:
        return Shard(feature_dim(module, parameter, out=True))

    def cut_out(self, width: int) -> Cut | None:
        return contiguous(width)

    def around(self, module: nn.Module, mesh: DeviceMesh) -> Around:
        return ColwiseForward(self, module, mesh)


class _GatheredForward(ColwiseForward):
    def _output(self, y: Tensor) -> Tensor:
        return c.gather(y, y.ndim - 1, self.width, self.group, partial_grad=False)


class ColwiseGatherOutput(Colwise):
    """Cut on the output features; the output is gathered."""

    name = "colwise_gather_output"
    aliases = ("colwise_rep",)
    output_is_slice = False
    rank_local = False

    def __init__(self) -> None:
        ColwiseParallel.__init__(self, output_layouts=Replicate())

    def cut_out(self, width: int) -> Cut | None:
        return None

    def sent(self, site: Site) -> Iterable[Sent]:
        return [forward("all_gather", features(site.module, out=True))]

    def around(self, module: nn.Module, mesh: DeviceMesh) -> Around:
        return _GatheredForward(self, module, mesh)


class LogitsForward(ColwiseForward):
    """What is around a head whose logits stay sharded."""

    def read(self, x: Tensor) -> Tensor:
        """The input, whole and ready for rank-local work, for code that computes logits a part at a time."""
        return reader_input(x, self.group, self.shared, self.length)

    @contextmanager
    def has_read(self) -> Iterator[None]:
        """Inside, inputs are parts of what :meth:`read` returned."""
        self.shared.open(direct=True)
        try:
            yield
        finally:
            self.shared.close()

    def _output(self, y: Tensor) -> Tensor:
        return sharded_logits(y, self.width, self.mesh)


class ColwiseLogits(Colwise):
    """The output head: the logits are a DTensor that stays sharded on the vocabulary."""

    name = "colwise_logits"
    reads = False  # beside the regions: nothing else reads its input
    output_is_slice = False
    rank_local = False

    def __init__(self) -> None:
        ColwiseParallel.__init__(self, output_layouts=Shard(-1), use_local_output=False)

    def specialised(self, place: Place) -> tuple[str, dict[str, Any]] | None:
        return ("colwise", {}) if place.in_block else None

    def cut_out(self, width: int) -> Cut | None:
        return None

    def sent(self, site: Site) -> Iterable[Sent]:
        # Cross-entropy on shards: the largest logit of every token, then three sums.
        return [Sent("all_reduce", False, 1, float32=True), Sent("all_reduce", False, 3, float32=True)]

    def around(self, module: nn.Module, mesh: DeviceMesh) -> Around:
        return LogitsForward(self, module, mesh)


class _HeadsForward(ColwiseForward):
    def __init__(self, style: FusedQkv, module: nn.Module, mesh: DeviceMesh) -> None:
        super().__init__(style, module, mesh)
        self.heads = style.heads

    def _output(self, y: Tensor) -> Tensor:
        whole = c.gather(y, y.ndim - 1, self.width, self.group, partial_grad=True)
        return whole.index_select(-1, torch.tensor(self.heads[self.group.rank], device=whole.device))


class FusedQkv(Colwise):
    """Unequal blocks (queries, keys, values) in one layer: the output is gathered, and each rank picks its features.

    Args:
        blocks: ``(width, parts)`` of every block, as a plan writes them: ``fused_qkv:64,32,32`` are blocks of 64, 32
            and 32 features, each cut in consecutive parts; in ``fused_qkv:64,32/2`` the second is made of two parts
            (key-value heads), which more ranks than two share. The planner turns them into ``heads``.
        heads: rank -> the features it picks.
    """

    name = "fused_qkv"

    def __init__(self, *, blocks: tuple[tuple[int, int], ...] = (), heads: tuple[tuple[int, ...], ...] = ()) -> None:
        super().__init__()
        self.blocks = blocks
        self.heads = heads

    @classmethod
    def written_options(cls, argument: str) -> dict[str, Any] | None:
        if not _BLOCKS.fullmatch(argument):
            return None
        pairs = (block.partition("/") for block in argument.split(","))
        return {"blocks": tuple((int(width), int(parts or 0)) for width, _, parts in pairs)}

    def cut_out(self, width: int) -> Cut | None:
        return Picked(features=self.heads)

    def sent(self, site: Site) -> Iterable[Sent]:
        width = features(site.module, out=True)
        return [forward("all_gather", width), backward("reduce_scatter", width)]

    def around(self, module: nn.Module, mesh: DeviceMesh) -> Around:
        return _HeadsForward(self, module, mesh)


_BLOCKS = re.compile(r"[1-9]\d*(/[1-9]\d*)?(,[1-9]\d*(/[1-9]\d*)?)*")


class _RowwiseForward(Around):
    def __init__(self, style: Rowwise, mesh: DeviceMesh) -> None:
        self.group = c.Group.of(mesh)
        self.input_is_slice = style.input_is_slice
        self.inside = style.inside
        self.length = style.length
        self.shared = style.shared

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, *others = args
        if not self.input_is_slice and not self.inside:
            x = c.scatter(x, x.ndim - 1, self.group)
        tensors: dict[str, Any] = local_parameters(module)
        bias = tensors.get("bias")
        if bias is not None and not (self.inside and self.group.rank == 0):
            # Every rank would add it; it belongs to the sum.
            tensors["bias"] = torch.zeros_like(bias) if is_transposed(module) else None
        with parameters_as(module, tensors):
            y = forward(x, *others, **kwargs)
        if self.inside:
            return y
        self.shared.written = True
        y = self._reduced(y)
        return y if bias is None else y + bias.to(y.dtype)  # which autocast has lowered

    def _reduced(self, y: Tensor) -> Tensor:
        if self.length is None:
            return c.reduce_from_region(y, self.group)
        return self.length.split(y, self.group, partial=True)


class Rowwise(Style, RowwiseParallel):
    """Cut on the input features; the output is the sum over the ranks, the bias added once."""

    name = "rowwise"
    writes = True
    for_adapted = True
    input_is_slice = True
    on_whole_input: ClassVar[str | None] = "rowwise_split_input"

    def __init__(self) -> None:
        RowwiseParallel.__init__(self, input_layouts=Shard(-1) if self.input_is_slice else Replicate())

    def specialised(self, place: Place) -> tuple[str, dict[str, Any]] | None:
        return ("embedding_rowwise", {}) if isinstance(base_layer(place.module), nn.Embedding) else None

    def check(self, module: nn.Module, name: str, size: int) -> None:
        _require_linear(module, name, self.name)

    def placement(self, module: nn.Module, parameter: str) -> Placement:
        return Replicate() if parameter == "bias" else Shard(feature_dim(module, parameter, out=False))

    def cut_in(self, width: int) -> Cut | None:
        return contiguous(width) if self.input_is_slice else None

    def sent(self, site: Site) -> Iterable[Sent]:
        width = features(site.module, out=True)
        if site.sequence:
            return [forward("reduce_scatter", width), backward("all_gather", width)]
        return [forward("all_reduce", width)]

    def around(self, module: nn.Module, mesh: DeviceMesh) -> Around:
        return _RowwiseForward(self, mesh)


class RowwiseSplitInput(Rowwise):
    """Cut on the input features, of an input that is whole: each rank takes its slice of it."""

    name = "rowwise_split_input"
    aliases = ("rowwise_rep",)
    input_is_slice = False
    on_whole_input = None

    def sent(self, site: Site) -> Iterable[Sent]:
        return [backward("all_gather", features(site.module, out=False)), *super().sent(site)]
