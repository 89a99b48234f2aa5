"""Embeddings cut over the vocabulary or over the features."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.distributed.tensor.placement_types import Placement
from torch.overrides import TorchFunctionMode

from shardwright.distributed.runtime import collectives as c
from shardwright.distributed.runtime.forward import (
    Around,
    Forward,
    local_parameters,
    original_class,
    parameters_as,
)
from shardwright.distributed.styles.base import LocalParameters, Style
from shardwright.distributed.styles.cuts import Cut, contiguous
from shardwright.distributed.styles.linear import parameter_shape
from shardwright.distributed.styles.traffic import Sent, Site, forward
from shardwright.errors import PlanError


def _require_embedding(module: nn.Module, name: str, style: str) -> nn.Embedding:
    if not isinstance(module, nn.Embedding):
        raise PlanError(f"{style!r} is for embeddings, but {name} is a {type(module).__name__}.")
    if module.max_norm is not None:
        raise PlanError(f"{name} renormalises its vectors in forward (max_norm); declare it 'replicate'.")
    if module.scale_grad_by_freq or module.sparse:
        raise PlanError(f"{name} has gradients by frequency, or sparse ones; declare it 'replicate'.")
    return module


class _VocabularyForward(Around):
    def __init__(self, vocabulary: int, mesh: DeviceMesh) -> None:
        self.group = c.Group.of(mesh)
        self.vocabulary = vocabulary

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        local = local_parameters(module)
        if original_class(module).forward is nn.Embedding.forward:
            (ids,) = (*args, *kwargs.values())
            return self.look_up(ids, local["weight"], cast(Any, module).padding_idx)
        with parameters_as(module, local), _LookUps(local["weight"], self.look_up):
            return forward(*args, **kwargs)

    def look_up(self, input: Tensor, weight: Tensor, padding_idx: int | None = None, **_: Any) -> Tensor:
        """``F.embedding`` of the whole table; ``weight`` is this rank's part. What else it takes is not in use."""
        start, end = self.group.bounds(self.vocabulary)
        elsewhere = (input < start) | (input >= end)
        here = padding_idx - start if padding_idx is not None and start <= padding_idx < end else None
        mine = (input - start).masked_fill(elsewhere, 0)
        vectors = nn.functional.embedding(mine, weight, here)
        return c.reduce_from_region(vectors.masked_fill(elsewhere.unsqueeze(-1), 0), self.group)


class _LookUps(TorchFunctionMode):
    """Every look-up in one table goes to ``answer``: the class of an embedding may do more than look ids up."""

    def __init__(self, weight: Tensor, answer: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight = weight
        self.answer = answer

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.embedding and args[1] is self.weight:
            return self.answer(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class EmbeddingRowwise(Style, RowwiseParallel):
    """Each rank holds a slice of the vocabulary; the lookups are summed."""

    name = "embedding_rowwise"
    table = True

    def __init__(self) -> None:
        RowwiseParallel.__init__(self, input_layouts=Replicate())

    def check(self, module: nn.Module, name: str, size: int) -> None:
        rows = _require_embedding(module, name, self.name).num_embeddings
        if (size - 1) * -(-rows // size) >= rows:
            raise PlanError(f"{name} has {rows} rows, too few for {size} tensor-parallel ranks to hold some each.")

    def placement(self, module: nn.Module, parameter: str) -> Placement:
        return Shard(0) if parameter == "weight" else Replicate()

    def sent(self, site: Site) -> Iterable[Sent]:
        return [forward("all_reduce", parameter_shape(site.module, "weight")[1])]

    def around(self, module: nn.Module, mesh: DeviceMesh) -> Around:
        return _VocabularyForward(parameter_shape(module, "weight")[0], mesh)


class _FeatureForward(Around):
    def __init__(self, width: int, mesh: DeviceMesh) -> None:
        self.group = c.Group.of(mesh)
        self.width = width

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with parameters_as(module, local_parameters(module)):
            vectors = forward(*args, **kwargs)
        return c.gather(vectors, vectors.ndim - 1, self.width, self.group, partial_grad=False)


class EmbeddingColwise(Style, ColwiseParallel):
    """Each rank holds a slice of every vector; the slices are gathered."""

    name = "embedding_colwise"

    def __init__(self) -> None:
        ColwiseParallel.__init__(self, output_layouts=Replicate())

    def check(self, module: nn.Module, name: str, size: int) -> None:
        _require_embedding(module, name, self.name)

    def placement(self, module: nn.Module, parameter: str) -> Placement:
        return Shard(1) if parameter == "weight" else Replicate()

    def sent(self, site: Site) -> Iterable[Sent]:
        return [forward("all_gather", parameter_shape(site.module, "weight")[1])]

    def around(self, module: nn.Module, mesh: DeviceMesh) -> Around:
        return _FeatureForward(parameter_shape(module, "weight")[1], mesh)


class EmbeddingSlice(EmbeddingColwise):
    """Each rank holds, and hands on, a slice of every vector: its heads of a table with a feature per head."""

    name = "embedding_slice"
    output_is_slice = True

    def cut_out(self, width: int) -> Cut | None:
        return contiguous(width)

    def sent(self, site: Site) -> Iterable[Sent]:
        return []

    def around(self, module: nn.Module, mesh: DeviceMesh) -> Around:
        return LocalParameters()
