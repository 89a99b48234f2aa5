"""Counts what autograd keeps for backward. Runs in the contenders' interpreters."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor


class SavedTensors:
    """The tensors saved inside the ``with`` block, by storage; those of the model's parameters are left out.

    The recomputation of checkpointed blocks saves to hooks of its own, below these: what it saves for the length of one
    block's backward is not counted.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters = (local(parameter) for parameter in model.parameters())
        self._known = {part.untyped_storage().data_ptr() for part in parameters}
        self._storages: dict[int, torch.Tensor] = {}  # the tensors are kept alive, so no address is used twice
        self._sizes: dict[int, int] = {}
        self._hooks = saved_tensors_hooks(self._pack, _unpack)

    @property
    def bytes(self) -> int:
        """Of all storages that were saved."""
        return sum(part.untyped_storage().nbytes() for part in self._storages.values())

    def widest(self, least: int) -> int:
        """Elements of the largest tensor that was saved, if they are ``least`` or more; else 0."""
        largest = max(self._sizes.values(), default=0)
        return largest if largest >= least else 0

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        part = local(tensor).detach()
        address = part.untyped_storage().data_ptr()
        if address not in self._known:
            self._storages.setdefault(address, part)
            self._sizes[address] = max(self._sizes.get(address, 0), part.numel())
        return tensor


def _unpack(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The memory behind a tensor on this rank."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    return tensor.trigger_wait() if isinstance(tensor, AsyncCollectiveTensor) else tensor
