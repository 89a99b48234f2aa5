"""The peak of all tensors of a real step on a rank, counted storage by storage."""

from __future__ import annotations

from typing import Any

import torch
from estimate_models import sharded
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shardwright import ParallelConfig


class AllBytes(TorchDispatchMode):
    """The bytes of every storage that is seen, as large as it is at the moment: FSDP2 frees its own in place."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[int, StorageWeakRef] = {}
        self.look(param.to_local() if isinstance(param, DTensor) else param for param in model.parameters())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        self.look(leaf for leaf in tree_leaves((args, kwargs, result)) if type(leaf) in (Tensor, torch.nn.Parameter))
        return result

    def look(self, tensors: Any) -> None:
        """Count all, where one of ``tensors`` is new."""
        storages = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu")
        known = self._storages
        new = {each._cdata: each for each in storages if each._cdata not in known or known[each._cdata].expired()}
        if not new:
            return
        self._storages = {key: ref for key, ref in self._storages.items() if not ref.expired()}
        self._storages |= {key: StorageWeakRef(storage) for key, storage in new.items()}
        alive = (torch.UntypedStorage._new_with_weak_ptr(ref.cdata) for ref in self._storages.values())
        self.peak = max(self.peak, sum(storage.nbytes() for storage in alive if storage is not None))


def real_peaks(cases: list[tuple[str, int, ParallelConfig]], shape: tuple[int, int]) -> list[int]:
    """The peak of the second step of AdamW, on this rank."""
    return [_peak(family, layers, config, shape) for family, layers, config in cases]


def _peak(family: str, layers: int, config: ParallelConfig, shape: tuple[int, int]) -> int:
    model = sharded(family, layers, config)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    ids = (torch.arange(shape[0] * shape[1]) % 90).view(shape)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    counted = AllBytes(model)
    for state in optimizer.state.values():
        counted.look(value.to_local() if isinstance(value, DTensor) else value for value in state.values())
    with counted:
        step()
    return counted.peak
