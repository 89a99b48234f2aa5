"""How many bytes of tensors are alive, and which kernels run, segment by segment of a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

from shardwright._torch import TorchDispatchMode, functional_collectives, storage_key, tree_leaves
from shardwright.estimate.trace.kernels import Kernel, Sending, is_copy, kernel_of, sending_of

_aten = torch.ops.aten
_GROUPED = _aten._grouped_mm.default
_EMBEDDING = _aten.embedding_dense_backward.default
_FLOAT32 = 4
_VALUE = _aten._local_scalar_dense.default


@dataclass
class Segment:
    """What happens between two moments of a step on one rank.

    Attributes:
        name: what runs: a block's name, or ``""`` for what lies between blocks.
        backward: in backward rather than in forward.
        delta: bytes that are alive at its end and were not at its beginning; gradients of parameters left out.
        peak: the most bytes alive in it, above those alive at its beginning, gradients of its parameters included.
        gradients: bytes of gradients that parameters hold at its end and did not at its beginning.
        input: bytes of the first tensor that the block is given, in forward.
        loss: it is a loss that is computed outside of the model.
        products_unread: bytes of its matrix products' results that are kept and that backward never reads, in forward.
        products_read: bytes of what its matrix products read, beside its input and the results of others, in forward.
        kernels: what it computes, and how often.
        sent: the collectives in it that computation waits for, and how often.
    """

    name: str
    backward: bool
    delta: int = 0
    peak: int = 0
    gradients: int = 0
    input: int = 0
    products_read: int = 0
    products_unread: int = 0
    loss: bool = False
    kernels: Counter[Kernel] = field(default_factory=Counter)
    sent: Counter[Sending] = field(default_factory=Counter)


class Live(TorchDispatchMode):
    """Follows the storages that operations inside make, and cuts time into segments.

    Args:
        gradients: bytes of the gradients that parameters hold at the moment.
        groups: name of a process group -> its axis and how many ranks it has.
        compiled_embedding: the gradient of an embedding is summed as a compiler does it, in float32.
    """

    def __init__(
        self,
        gradients: Callable[[], int] = lambda: 0,
        groups: Mapping[str, tuple[str, int]] | None = None,
        *,
        compiled_embedding: bool = False,
    ) -> None:
        super().__init__()
        self.segments: list[Segment] = []
        self.peak = self.now = 0
        self._gradients, self._groups = gradients, groups or {}
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._start = self._start_gradients = 0
        self._backward = False
        self._made_by_products: set[int] = set()
        self._compiled_embedding = compiled_embedding
        self._received: set[int] = set()
        self._copied: dict[int, tuple[Segment, Kernel]] = {}
        self._unread: dict[int, tuple[Segment, StorageWeakRef, int]] = {}

    def begin(self, name: str, *, backward: bool | None = None, loss: bool = False) -> None:
        """End the running segment, and begin one."""
        self._close()
        self._backward = self._backward if backward is None else backward
        self.segments.append(Segment(name, self._backward, loss=loss))
        self._start, self._start_gradients = self.now, self._gradients()

    def end(self) -> None:
        """End the last segment."""
        self._close()
        for segment, _, size in self._unread.values():
            segment.products_unread += size
        self._unread.clear()

    def _close(self) -> None:
        self._count()
        if self.segments:
            segment = self.segments[-1]
            segment.gradients = self._gradients() - self._start_gradients
            segment.delta = self.now - self._start - segment.gradients
            if not segment.backward:
                self._unread = {key: kept for key, kept in self._unread.items() if not kept[1].expired()}

    def _count(self) -> None:
        self._storages = {key: kept for key, kept in self._storages.items() if not kept[0].expired()}
        self.now = sum(size for _, size in self._storages.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it turns into local operations, which come by here again
        kwargs = kwargs or {}
        if func is _VALUE:
            return 0.0 if args[0].is_floating_point() else 0  # checks of values find nothing to object to
        given = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)}
        result = _result(func, args, kwargs)
        for leaf in tree_leaves(result):
            if _is_tensor(leaf):
                self._take(leaf, given)
        if self.segments:
            segment = self.segments[-1]
            segment.peak = max(segment.peak, self.now - self._start + self._beside(func, result))
            if segment.backward:
                for key in given:
                    self._unread.pop(key, None)
            if (sending := sending_of(func, args, result, self._groups)) is not None:
                segment.sent[sending] += 1
                self._note_sending(sending, args, result)
            elif func is functional_collectives.wait_tensor.default and given & self._received:
                self._received = self._received - given | {_key(result)}
            elif (kernel := kernel_of(func, args, kwargs, result)) is not None:
                if is_copy(func):
                    kernel = self._note_copy(kernel, given, result, segment)
                segment.kernels[kernel] += 1
                if not segment.backward:
                    self._note_products(kernel, args, result, segment)
        return result

    def _note_products(self, kernel: Kernel, args: Any, result: Any, segment: Segment) -> None:
        """Count what a product reads, once, unless a product or an attention made it."""
        if kernel.kind in ("memory", "copy"):
            return
        for leaf in tree_leaves(args) if kernel.kind == "matmul" else ():
            if _is_tensor(leaf) and _key(leaf) in self._storages and _key(leaf) not in self._made_by_products:
                segment.products_read += leaf.untyped_storage().nbytes()
                self._made_by_products.add(_key(leaf))
        made = {_key(leaf): leaf.untyped_storage() for leaf in tree_leaves(result) if _is_tensor(leaf)}
        self._made_by_products |= made.keys()
        self._unread |= {key: (segment, StorageWeakRef(kept), kept.nbytes()) for key, kept in made.items()}

    def _note_sending(self, sending: Sending, args: Any, result: Any) -> None:
        """The copy that made what a reduction sends is one by itself, and so is that of what a gather has received."""
        if sending.kind == "all_gather":
            self._received.add(_key(result))
        if sending.kind == "reduce_scatter" and (found := self._copied.pop(_key(args[0]), None)) is not None:
            segment, kernel = found
            segment.kernels[kernel] -= 1
            segment.kernels[replace(kernel, kind="copy")] += 1

    def _note_copy(self, kernel: Kernel, given: set[int], result: Any, segment: Segment) -> Kernel:
        if given & self._received:
            self._received -= given
            return replace(kernel, kind="copy")
        self._copied[_key(result)] = (segment, kernel)
        return kernel

    def _beside(self, func: Any, result: Any) -> int:
        """Bytes that a compiled operation needs beside its result, and that of the same name does not."""
        summed = self._compiled_embedding and func is _EMBEDDING
        return result.numel() * _FLOAT32 if summed and result.element_size() < _FLOAT32 else 0

    def _take(self, tensor: Tensor, given: set[int]) -> None:
        key = _key(tensor)
        if key in self._storages and not self._storages[key][0].expired():
            return
        if key in given:
            return  # a view of what was there before
        storage = tensor.untyped_storage()
        self._made_by_products.discard(key)
        self._storages[key] = (StorageWeakRef(storage), storage.nbytes())
        self._count()
        self.peak = max(self.peak, self.now)


def _result(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func is not _GROUPED or args[0].dtype == torch.bfloat16:
        return func(*args, **kwargs)
    # The fake kernel of grouped products knows bfloat16 alone.
    halved = [arg.bfloat16() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args]
    return func(*halved, **kwargs).to(args[0].dtype)


def _key(tensor: Tensor) -> int:
    return storage_key(tensor)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and not isinstance(leaf, DTensor) and leaf.device.type != "meta"
