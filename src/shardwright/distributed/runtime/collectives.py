"""The differentiable collectives that tensor and sequence parallelism are made of.

Each changes how one tensor is laid out over a group of ranks, and its backward is the transpose of that change: another
of them, so that gradients can be differentiated too. The names are Megatron-LM's (Korthikanti et al. 2022, "Reducing
Activation Recomputation in Large Transformer Models").

Words: a *replicated* tensor is whole and equal on every rank, and so is its gradient. A *sequence shard* is this rank's
chunk, in ``torch.chunk``'s sizes, so lengths that the ranks do not divide work. A gradient is *partial* when the true
one is the sum over the ranks.

This is the one file that calls torch's functional collectives, which are not public. Tested with torch 2.11 and 2.13.
They are what DTensor itself issues, so tracers, ``torch.compile`` and ``CommDebugMode`` know them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import pad
from torch.torch_version import TorchVersion

from shardwright._torch import functional_collectives as _functional
from shardwright.errors import UnsupportedError

# Local tensors of DTensors have no second gradient in torch 2.11, without an error; 2.12 was not tried.
_TWICE = TorchVersion(torch.__version__) >= "2.13"


@dataclass(frozen=True)
class Group:
    """One axis of a mesh as the collectives see it. Hashable and free of handles, so it can be copied with a model."""

    name: str
    size: int
    rank: int

    @classmethod
    def of(cls, mesh: DeviceMesh) -> Group:
        """The group of a one-dimensional mesh."""
        return cls(mesh.get_group().group_name, mesh.size(), mesh.get_local_rank())

    def bounds(self, length: int) -> tuple[int, int]:
        """Start and end of this rank's chunk of ``length`` items."""
        chunk = -(-length // self.size)
        return min(self.rank * chunk, length), min((self.rank + 1) * chunk, length)


def all_reduce(x: Tensor, group: Group, op: str = "sum") -> Tensor:
    """The sum (or ``max``) of ``x`` over the ranks, as a new tensor; not differentiable."""
    return _functional.wait_tensor(_functional.all_reduce(x.contiguous(), op, group.name))


def all_gather(x: Tensor, dim: int, length: int, group: Group) -> Tensor:
    """The ranks' chunks put together along ``dim``, which is ``length`` long in all; not differentiable."""
    chunk = -(-length // group.size)
    missing = chunk - x.size(dim)
    if missing:
        x = pad(x, _padding(x, dim, missing))
    x = x.movedim(dim, 0).contiguous()
    whole = _functional.wait_tensor(_functional.all_gather_into_tensor(x, group.size, group.name))
    return whole.narrow(0, 0, length).movedim(0, dim).contiguous()


def reduce_scatter(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's chunk along ``dim`` of the sum of ``x`` over the ranks; not differentiable."""
    length = x.size(dim)
    missing = -(-length // group.size) * group.size - length
    if missing:
        x = pad(x, _padding(x, dim, missing))
    x = x.movedim(dim, 0).contiguous()
    mine = _functional.wait_tensor(_functional.reduce_scatter_tensor(x, "sum", group.size, group.name))
    start, end = group.bounds(length)
    return mine.narrow(0, 0, end - start).movedim(0, dim).contiguous()


def all_to_all(x: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
    """The rows that every rank has for this one, in the order of the ranks; not differentiable.

    Args:
        send: how many rows of ``x`` go to each rank, in the order of the ranks.
        receive: how many rows come from each.
    """
    return _functional.wait_tensor(_functional.all_to_all_single(x.contiguous(), receive, send, group.name))


def local_chunk(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's chunk of ``x`` along ``dim``."""
    start, end = group.bounds(x.size(dim))
    return x.narrow(dim, start, end - start).contiguous()


def _padding(x: Tensor, dim: int, amount: int) -> list[int]:
    """``torch.nn.functional.pad``'s argument for ``amount`` zeros at the end of ``dim``."""
    after = x.ndim - 1 - dim % x.ndim
    return [0, 0] * after + [0, amount]


def refuse_twice() -> None:
    """Raise in a backward that is itself to be differentiated, where this torch would get it wrong."""
    if not _TWICE and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise UnsupportedError(
            f"torch {torch.__version__} loses gradients of gradients (create_graph=True) under tensor parallelism; use "
            "torch 2.13."
        )


class _CopyToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        refuse_twice()
        return reduce_from_region(grad, ctx.group), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shared: Tensor, x: Tensor) -> Tensor:
        return shared.view_as(shared)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _ReduceFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return copy_to_region(grad, ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, length: int, group: Group, partial_grad: bool) -> Tensor:
        ctx.dim, ctx.group, ctx.partial_grad = dim, group, partial_grad
        return all_gather(x, dim, length, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        refuse_twice()
        return _Scatter.apply(grad, ctx.dim, ctx.group, ctx.partial_grad), None, None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group, partial: bool) -> Tensor:
        ctx.dim, ctx.group, ctx.length, ctx.partial = dim, group, x.size(dim), partial
        return (reduce_scatter if partial else local_chunk)(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return gather(grad, ctx.dim, ctx.length, ctx.group, partial_grad=ctx.partial), None, None, None


def copy_to_region(x: Tensor, group: Group) -> Tensor:
    """A replicated tensor for rank-local work: unchanged; backward sums the ranks' partial gradients."""
    return _CopyToRegion.apply(x, group)


def join(shared: Tensor, x: Tensor) -> Tensor:
    """``shared``, in the place of ``x``, whose gradient goes to ``shared`` too.

    ``x`` stays in the graph, so that backward hooks on it still run.
    """
    return _Join.apply(shared, x)


def reduce_from_region(x: Tensor, group: Group) -> Tensor:
    """The replicated sum of the ranks' partial results; backward hands the replicated gradient to each."""
    return _ReduceFromRegion.apply(x, group)


def gather(x: Tensor, dim: int, length: int, group: Group, *, partial_grad: bool) -> Tensor:
    """The whole of what the ranks hold in chunks along ``dim`` (``length`` in all).

    Args:
        partial_grad: True where what follows is rank-local work, whose gradients are partial (backward is a
            reduce-scatter); False where every rank does the same work (backward takes this rank's chunk).
    """
    return _Gather.apply(x, dim, length, group, partial_grad)


def scatter(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's chunk of a replicated tensor; backward gathers the chunks' gradients."""
    return _Scatter.apply(x, dim, group, False)


def reduce_scatter_from_region(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's chunk of the sum of the ranks' partial results; backward gathers."""
    return _Scatter.apply(x, dim, group, True)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return all_to_all(x, send, receive, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        refuse_twice()
        return exchange(grad, ctx.receive, ctx.send, ctx.group), None, None, None


def exchange(x: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
    """The rows that every rank has for this one (:func:`all_to_all`); backward sends their gradients back."""
    return _Exchange.apply(x, send, receive, group)


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.set_materialize_grads(False)
        # Nothing is saved: a checkpointed block that runs again by itself has not the same calls of this function.
        ctx.like = [(t.shape, t.dtype, t.device) for t in tensors]
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # Summed in float32 at least: the buffers are small, and bf16 sums lose what FSDP's fp32 reduction keeps.
        # A number per tensor says on how many ranks it was used: one that none has used has no gradient.
        shapes, dtypes, devices = zip(*ctx.like, strict=True)
        parts = [
            torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
            for grad, (shape, dtype, device) in zip(grads, ctx.like, strict=True)
        ]
        used = torch.tensor([float(grad is not None) for grad in grads], device=devices[0])
        dtype = reduce(torch.promote_types, (part.dtype for part in parts), torch.float32)
        whole = torch.cat([used.to(dtype), *(part.reshape(-1).to(dtype) for part in parts)])
        flat = reduce_from_region(whole, ctx.group)
        used, *pieces = flat.split([len(grads), *(part.numel() for part in parts)])
        sums = [piece.view(shape).to(own) for piece, shape, own in zip(pieces, shapes, dtypes, strict=True)]
        if all(grad is not None for grad in grads):
            return None, *sums
        return None, *(total if count else None for total, count in zip(sums, used.tolist(), strict=True))


def sum_gradients(tensors: list[Tensor], group: Group) -> list[Tensor]:
    """The same tensors; backward sums their partial gradients over the ranks, all of them in one collective."""
    return list(_SumGradients.apply(group, *tensors))
