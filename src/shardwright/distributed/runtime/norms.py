"""Norms of single gradients, as logs want them."""

from __future__ import annotations

from math import inf

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate


@torch.no_grad()
def gradient_norms(model: nn.Module, norm_type: float = 2.0) -> dict[str, float]:
    """The norm of every parameter's gradient, whole and the same on every rank, sharded or not.

    To be called on every rank: the ranks exchange their parts, with one all-reduce for each axis of the mesh. (The norm
    of all gradients together is what ``torch.nn.utils.get_total_norm`` and ``clip_grad_norm_`` return.)

    Args:
        norm_type: p of the p-norm, more than 0, or ``inf`` for the largest absolute value.

    Returns:
        Parameter name -> norm; parameters without a gradient are left out.
    """
    grads = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    if not grads:
        return {}
    parts = [_part(grad, norm_type) for grad in grads.values()]
    total = torch.stack(parts)
    for mesh in dict.fromkeys(grad.device_mesh for grad in grads.values() if isinstance(grad, DTensor)):
        here = torch.tensor([isinstance(g, DTensor) and g.device_mesh == mesh for g in grads.values()])
        total[here] = _over(mesh, total[here], norm_type)
    return dict(zip(grads, (total if norm_type == inf else total ** (1 / norm_type)).tolist(), strict=True))


def _part(grad: Tensor, norm_type: float) -> Tensor:
    """What this rank adds to a norm: its shard's elements, counted by one of the ranks that hold the same shard."""
    counts = True
    if isinstance(grad, DTensor):
        if any(placement.is_partial() for placement in grad.placements):
            grad = grad.redistribute(placements=[Replicate() if p.is_partial() else p for p in grad.placements])
        mesh = grad.device_mesh
        replicated = [axis for axis, placement in enumerate(grad.placements) if placement.is_replicate()]
        counts = all(mesh.get_local_rank(axis) == 0 for axis in replicated)
        grad = grad.to_local()
    if not (counts and grad.numel()):
        return torch.zeros((), dtype=torch.float64, device=grad.device)
    norm = torch.linalg.vector_norm(grad, norm_type, dtype=torch.promote_types(grad.dtype, torch.float32)).double()
    return norm if norm_type == inf else norm**norm_type


def _over(mesh: DeviceMesh, parts: Tensor, norm_type: float) -> Tensor:
    for axis in range(mesh.ndim):
        if mesh.size(axis) > 1:
            dist.all_reduce(parts, dist.ReduceOp.MAX if norm_type == inf else dist.ReduceOp.SUM, mesh.get_group(axis))
    return parts
