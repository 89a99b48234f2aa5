"""What one operation costs: floating-point operations by shape, bytes read and written, bytes sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import flop_registry

from shardwright._torch import packet_of, tree_leaves
from shardwright.distributed.axes import EXPERTS

_aten = torch.ops.aten
_FLASH = {
    _aten._scaled_dot_product_flash_attention_for_cpu: False,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: True,
}
_COLLECTIVES = {
    "all_reduce": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
}


@dataclass(frozen=True)
class Kernel:
    """One kernel.

    Attributes:
        kind: ``"matmul"``, ``"attention"``, ``"attention_backward"``, ``"memory"`` (whatever is bound by its bytes) or
            ``"copy"`` (a copy between a product and a collective, which no compiler can fuse into either).
        flops: floating-point operations that are needed (a causal mask halves those of attention).
        bytes: read and written.
        shape: ``(batch, m, n, k)`` of a matrix product; ``(batch, heads, length, head size)`` of an attention.
        dtype: that it computes in.
        causal: whether a mask halves what an attention computes.
    """

    kind: str
    flops: int
    bytes: int
    shape: tuple[int, ...] = ()
    dtype: str = ""
    causal: bool = False

    @property
    def written(self) -> int:
        """Bytes of the result of a matrix product or an attention; 0 for others, and where the shape is not known."""
        if self.kind not in ("matmul", "attention") or not self.shape:
            return 0
        batch, rows, columns, last = self.shape
        itemsize: int = getattr(torch, self.dtype).itemsize
        return batch * rows * columns * (last if self.kind == "attention" else 1) * itemsize


@dataclass(frozen=True)
class Sending:
    """One collective.

    Attributes:
        bytes: the size of the whole tensor; of an exchange, what one rank has.
        axis: of the ranks that take part.
    """

    kind: str
    bytes: int
    axis: str = "tp"


def sending_of(func: Any, args: tuple[Any, ...], result: Any, groups: Mapping[str, tuple[str, int]]) -> Sending | None:
    """The collective that ``func`` is; None for anything else.

    Args:
        groups: name of a process group -> its axis and how many ranks it has.
    """
    kind = _COLLECTIVES.get(func.__name__.partition(".")[0]) if func.namespace == "_c10d_functional" else None
    if kind is None:
        return None
    axis, ranks = groups[args[-1]]
    if kind == "all_to_all" and axis == "tp":
        axis = EXPERTS  # these can be the same ranks, and tensor parallelism exchanges nothing
    whole = args[0].numel() * args[0].element_size() * (ranks if kind == "all_gather" else 1)
    return Sending(kind, _of_even(args, result, ranks) if kind == "all_to_all" else whole, axis)


def _of_even(args: tuple[Any, ...], result: Tensor, ranks: int) -> int:
    """What a rank has in an exchange of equal pieces which takes as long as one with pieces of these sizes.

    In an uneven one a rank keeps nothing, and waits for the more of what it sends and what it gets.
    """
    x, receive, send, _ = args
    most = max(x.numel(), result.numel()) * x.element_size()
    return most if len({*receive, *send}) == 1 else most * ranks // (ranks - 1)


def is_copy(func: Any) -> bool:
    """Whether all that ``func`` does is to write what it reads, in another order."""
    return func in (_aten.clone.default, _aten.cat.default, _aten.copy_.default)


def kernel_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Kernel | None:
    """The kernel that ``func`` runs; None where it runs none (a view, an allocation, a collective)."""
    if func.is_view or func.namespace not in ("aten", "fsdp") or func in _NO_KERNEL:
        return None
    packet = packet_of(func)
    reads = [leaf for leaf in tree_leaves((args, kwargs)) if _counts(leaf)]
    writes = [leaf for leaf in tree_leaves(result) if _counts(leaf)]
    if func in _LOOKS_UP:
        reads = reads[1:]  # of the first, a row for each index
    moved = sum(leaf.numel() * leaf.element_size() for leaf in (*reads, *writes))
    if packet in _FLASH:
        return _attention(args, kwargs, moved, backward=_FLASH[packet])
    flops = 0
    if packet is _aten._grouped_mm:  # every row meets one of the matrices
        flops = 2 * args[0].numel() * args[1].shape[-1]
    elif packet in flop_registry:
        flops = int(flop_registry[packet](*args, **kwargs, out_val=result))
    if flops:
        dtype = str(reads[0].dtype).removeprefix("torch.")
        return Kernel("matmul", flops, moved, _product(packet, reads, flops), dtype)
    return Kernel("memory", 0, moved) if moved else None


_NO_KERNEL = {
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.detach.default,
    _aten._unsafe_view.default,
    _aten._local_scalar_dense.default,
}


_LOOKS_UP = {_aten.embedding.default, _aten.nll_loss_forward.default, _aten.gather.default, _aten.index.Tensor}


def _product(packet: Any, tensors: list[Tensor], flops: int) -> tuple[int, ...]:
    """``(batch, m, n, k)``; empty where it is no plain product."""
    if packet in (_aten.mm, _aten.bmm):
        a, b = tensors[:2]
    elif packet in (_aten.addmm, _aten.baddbmm):
        a, b = tensors[1:3]
    else:
        return ()
    return (prod(a.shape[:-2]), a.shape[-2], b.shape[-1], a.shape[-1])


def _attention(args: tuple[Any, ...], kwargs: dict[str, Any], moved: int, *, backward: bool) -> Kernel:
    """Two products of ``queries x keys`` in forward, five in backward.

    Under a causal mask the last query sees all keys, the first as many fewer as there are queries.
    """
    query, key = (args[1], args[2]) if backward else (args[0], args[1])
    flags = [value for value in (*args, *kwargs.values()) if isinstance(value, bool)]
    causal = any(flags)
    batch, heads, length, size = query.shape
    keys = key.shape[-2]
    products = 5 if backward else 2
    seen = length * keys - (length * min(length, keys) // 2 if causal else 0)
    flops = products * 2 * batch * heads * seen * size
    kind = "attention_backward" if backward else "attention"
    dtype = str(query.dtype).removeprefix("torch.")
    return Kernel(kind, flops, moved, (batch, heads, length, size), dtype, causal)


def _counts(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and not isinstance(leaf, DTensor)
