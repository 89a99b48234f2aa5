"""Distributed parameters and gradients: DTensors whose shards are uneven.

Megatron-FSDP lays the parameters of a unit end to end in one buffer and cuts that evenly, so a rank may hold many
rows of one parameter and none of another. Each shard is a ``DTensor`` on the mesh ``(dp,)``, or ``(dp, tp)`` with
tensor parallelism, so that optimizers and gradient clipping see one kind of tensor. Elementwise work and norms are
right on it. What assumes even shards is not: use :func:`full_tensor` (the parameters' and gradients' own
``full_tensor`` method is that one) and :func:`copy_full_tensor_`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from shardwright._torch import StridedShard, compute_local_shape_and_global_offset, local_tensor
from shardwright.distributed.runtime.layout import whole
from shardwright.errors import UnsupportedError


@dataclass(frozen=True)
class Layout:
    """The mesh of the distributed parameters.

    Attributes:
        mesh: ``(dp,)`` or ``(dp, tp)``.
        sharded: whether the parameters are cut over ``dp``; they are whole there otherwise.
    """

    mesh: DeviceMesh
    sharded: bool

    def distribute(self, flat: Tensor, raw: Tensor) -> DTensor:
        """``flat``, this rank's elements of ``raw``, as a DTensor of the shape of ``raw``."""
        local = flat.view(-1, *local_part(raw).shape[1:])
        dp = Shard(0) if self.sharded else Replicate()
        placements: list[Placement] = [dp] if self.mesh.ndim == 1 else [dp, _tp_placement(raw)]
        return _dtensor(local, self.mesh, placements, raw.shape, raw.stride())


def local_part(x: Tensor) -> Tensor:
    """This rank's part of ``x``, sharing its memory."""
    return local_tensor(x) if isinstance(x, DTensor) else x


def like(param: Tensor, flat: Tensor) -> DTensor:
    """``flat`` laid out as the distributed parameter ``param``."""
    param = cast(DTensor, param)
    local = flat.view(local_part(param).shape)
    made = _dtensor(local, param.device_mesh, param.placements, param.shape, param.stride())
    return locate(made, vars(param)["elements"])


def locate(x: DTensor, elements: tuple[int, int]) -> DTensor:
    """``x``, knowing where its shard lies: its ``full_tensor`` method is ours.

    Args:
        elements: first and last-but-one element of the shard in the flattened tensor part of its ``tp`` rank.
    """
    x.elements = elements  # type: ignore[attr-defined]
    x.full_tensor = MethodType(full_tensor, x)  # type: ignore[method-assign]
    return x


def held_rows(x: Tensor) -> slice | None:
    """Which rows of the part of its ``tp`` rank a distributed tensor holds; None for all other tensors.

    Its first mesh axis, the data-parallel one, is cut by these rows and not evenly.
    """
    if "elements" not in vars(x):
        return None
    size = local_part(x).shape[1:].numel()  # of a row
    start, end = vars(x)["elements"]
    return slice(start // size, end // size) if size else slice(0, local_part(x).shape[0])


def state_like(param: Tensor, state: Tensor) -> Tensor:
    """``state``, which an optimizer keeps for ``param``, in the same memory and knowing where its shard lies.

    Anything but a tensor of the shape of a distributed parameter is returned as it is.
    """
    if held_rows(param) is None or not isinstance(state, DTensor) or state.shape != param.shape:
        return state
    return like(param, local_part(state))


def full_tensor(x: Tensor) -> Tensor:
    """The whole of a distributed parameter, its gradient or its optimizer state, on every rank.

    A collective over the mesh. Any other tensor is returned as torch would gather it.

    Args:
        x: a DTensor on ``(dp,)`` or ``(dp, tp)`` as described above.

    Returns:
        A plain tensor of the shape of ``x``, without a gradient.
    """
    if not isinstance(x, DTensor):
        return x
    mesh, (dp, *tp) = x.device_mesh, x.placements
    local = local_part(x.detach())
    if dp == Shard(0):
        local = _gather_rows(local, mesh.get_group(0))
    if not tp:
        return local
    return whole(_dtensor(local, _tp_mesh(mesh), tp, x.shape, x.stride()))


@torch.no_grad()
def copy_full_tensor_(param: Tensor, full: Tensor) -> None:
    """Write this rank's part of ``full`` into a distributed parameter. No communication.

    Args:
        param: a parameter of a model sharded by this engine.
        full: a plain tensor of the same shape, equal on all ranks.
    """
    param = cast(DTensor, param)
    mesh, (_, *tp) = param.device_mesh, param.placements
    part = distribute_tensor(full, _tp_mesh(mesh), tp, src_data_rank=None).to_local() if tp else full
    start, end = vars(param)["elements"]
    local = local_part(param)
    local.copy_(part.flatten()[start:end].view(local.shape))


def describe_for_dcp(x: DTensor) -> None:
    """Tell ``torch.distributed.checkpoint`` where the shard ``x`` lies; it would assume even shards.

    Uses the two hooks that DCP has for it (``__create_chunk_list__`` and ``__create_write_items__``).

    Args:
        x: a shard that :func:`locate` knows.
    """
    local, tp = local_part(x), list(x.placements[1:])
    if any(isinstance(placement, StridedShard) for placement in tp):
        refuse = _refuse_packed(x)
        local.__create_chunk_list__ = local.__create_write_items__ = refuse  # type: ignore[attr-defined]
        return
    offsets = [0] * x.ndim
    if tp:
        offsets = list(compute_local_shape_and_global_offset(x.shape, _tp_mesh(x.device_mesh), tp)[1])
    rows = held_rows(x)
    assert rows is not None
    offsets[0] += rows.start
    chunk = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=local.shape)

    def write_items(name: str, tensor: DTensor) -> list[WriteItem]:
        if chunk.sizes.numel() == 0:
            return []
        properties = TensorProperties.create_from_tensor(tensor.to_local())
        data = TensorWriteData(chunk=chunk, properties=properties, size=tensor.size())
        return [WriteItem(type=WriteItemType.SHARD, index=MetadataIndex(name, chunk.offsets), tensor_data=data)]

    local.__create_chunk_list__ = lambda: [chunk] if chunk.sizes.numel() else []  # type: ignore[attr-defined]
    local.__create_write_items__ = write_items  # type: ignore[attr-defined]


def _refuse_packed(x: DTensor) -> Callable[..., Any]:
    shape, placements = tuple(x.shape), x.placements

    def refuse(*_: Any) -> Any:
        raise UnsupportedError(
            f"A weight of shape {shape} packs several matrices, each cut over the tensor-parallel ranks "
            f"({placements}); "
            "torch.distributed.checkpoint can only describe shards that are one block. Save it with full_tensor, or "
            "use engine: fsdp2."
        )

    return refuse


def _gather_rows(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The ranks' rows, one after the other. Padded to equal numbers: gloo refuses unequal ones."""
    size = dist.get_world_size(group)
    rows = torch.zeros(size, dtype=torch.int64, device=local.device)
    rows[dist.get_rank(group)] = local.shape[0]
    dist.all_reduce(rows, group=group)
    counts = rows.tolist()
    padded = local.new_zeros(max(counts), *local.shape[1:])
    padded[: local.shape[0]] = local
    pieces = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(pieces, padded, group=group)
    return torch.cat([piece[:count] for piece, count in zip(pieces, counts, strict=True)])


def _tp_placement(raw: Tensor) -> Placement:
    return raw.placements[0] if isinstance(raw, DTensor) else Replicate()


def _tp_mesh(mesh: DeviceMesh) -> DeviceMesh:
    assert mesh.mesh_dim_names is not None
    return mesh[mesh.mesh_dim_names[1]]


def _dtensor(local: Tensor, mesh: DeviceMesh, placements: Any, shape: torch.Size, stride: tuple[int, ...]) -> DTensor:
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)
