"""How many bytes of tensors are alive, counted while a model runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """The memory of all tensors that operations inside have made and that are still alive, at its highest.

    Attributes:
        peak: bytes, besides those of tensors that were there before.
        widest: elements of the largest matrix with a last dim of ``wide``, or one less on a rank with fewer.
    """

    def __init__(self, wide: int = 0) -> None:
        super().__init__()
        self.peak = self.now = self.widest = 0
        self.wide = wide
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it turns into local operations, which come by here again
        given = {_storage(leaf)._cdata for leaf in tree_leaves((args, kwargs or {})) if _is_real(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if _is_real(leaf):
                self._take(leaf, given)
        return result

    def _take(self, tensor: Tensor, given: set[int]) -> None:
        storage = _storage(tensor)
        real = storage.nbytes() >= tensor.numel() * tensor.element_size()  # an expanded one takes no more memory
        if real and tensor.ndim > 1 and self.wide - 1 <= tensor.shape[-1] <= self.wide:
            self.widest = max(self.widest, tensor.numel())
        if storage._cdata in given and storage._cdata not in self._storages:
            return  # a view of what was there before
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self._storages = {key: kept for key, kept in self._storages.items() if not kept[0].expired()}
            self.now = sum(size for _, size in self._storages.values())
            self.peak = max(self.peak, self.now)


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()


def _is_real(leaf: Any) -> bool:
    return type(leaf) in (Tensor, torch.nn.Parameter) and not leaf.is_meta
