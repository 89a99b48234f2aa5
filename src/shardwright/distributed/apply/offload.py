"""Inputs of checkpointed blocks that wait for backward in host memory.

A block that is recomputed keeps its input, and of a long sequence these inputs are what is left of the activations.
Each is copied to the host when its block has run, and back when backward comes to it. On a GPU the copies run beside
the computation, in a stream of their own, and the one that backward will need next is fetched ahead.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor


class HostMemory:
    """The tensors of one model that wait on the host, in the order in which they were saved.

    Attributes:
        held: bytes that they take now.
    """

    def __init__(self) -> None:
        self._waiting: list[weakref.ref[_Waiting]] = []
        self._streams: dict[torch.device, Any] = {}

    @property
    def held(self) -> int:
        return sum(waiting.host.nbytes for waiting in self._alive())

    @contextmanager
    def keeps(self) -> Iterator[None]:
        """What autograd saves inside is kept here."""
        with saved_tensors_hooks(self._put, self._get):
            yield

    def __deepcopy__(self, memo: dict[int, Any]) -> HostMemory:
        return HostMemory()  # a copy of the model has saved nothing yet

    def _alive(self) -> list[_Waiting]:
        self._waiting = [ref for ref in self._waiting if ref() is not None]
        return [waiting for ref in self._waiting if (waiting := ref()) is not None]

    def _put(self, tensor: Tensor) -> Any:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if not local.is_floating_point():
            return tensor
        waiting = _Waiting(tensor, local.detach(), self._stream(local.device))
        self._waiting = [ref for ref in self._waiting if ref() is not None]
        self._waiting.append(weakref.ref(waiting))
        return waiting

    def _get(self, saved: Any) -> Tensor:
        if not isinstance(saved, _Waiting):
            return saved
        before = self._before(saved)
        tensor = saved.fetched()
        if before is not None:
            before.fetch()
        return tensor

    def _before(self, waiting: _Waiting) -> _Waiting | None:
        """What was saved before ``waiting``, and still waits: backward comes to it next."""
        alive = self._alive()
        place = next(n for n, other in enumerate(alive) if other is waiting)
        return alive[place - 1] if place else None

    def _stream(self, device: torch.device) -> Any:
        if device.type == "cpu":
            return None
        if device not in self._streams:
            self._streams[device] = torch.get_device_module(device).Stream(device)
        return self._streams[device]


class _Waiting:
    """One tensor on the host."""

    def __init__(self, tensor: Tensor, local: Tensor, stream: Any) -> None:
        self.device, self.stream = local.device, stream
        self._as_dtensor: tuple[Any, ...] | None = None
        if isinstance(tensor, DTensor):
            self._as_dtensor = type(tensor), tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride()
        self._ahead: Tensor | None = None
        if stream is None:
            self.host = local.clone()
            return
        self.host = torch.empty(local.shape, dtype=local.dtype, pin_memory=True)
        module = torch.get_device_module(self.device)
        stream.wait_stream(module.current_stream(self.device))
        with module.stream(stream):
            self.host.copy_(local, non_blocking=True)
        local.record_stream(stream)  # its memory is not given to another tensor before the copy has ended

    def fetch(self) -> None:
        """Begin to copy it back."""
        if self._ahead is None and self.stream is not None:
            with torch.get_device_module(self.device).stream(self.stream):  # behind the copy to the host
                self._ahead = self.host.to(self.device, non_blocking=True)

    def fetched(self) -> Tensor:
        """The tensor on its device, as it was saved."""
        local = self.host if self.stream is None else self._on_device()
        if self._as_dtensor is None:
            return local
        cls, mesh, placements, shape, stride = self._as_dtensor
        made = DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)
        made.__class__ = cls
        return made

    def _on_device(self) -> Tensor:
        self.fetch()
        current = torch.get_device_module(self.device).current_stream(self.device)
        current.wait_stream(self.stream)
        local, self._ahead = self._ahead, None
        assert local is not None
        local.record_stream(current)
        return local
