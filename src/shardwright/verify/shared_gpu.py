"""A backend for ranks that share a GPU, which NCCL refuses: what they exchange goes through host memory and gloo.

Slow, but every kernel runs on the GPU, so one GPU shows whether a sharded model computes there what one process
computes. (gloo takes GPU tensors itself, but torch 2.11 crashes in its asynchronous collectives on them.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BACKEND = "shared_gpu"
_ProcessGroup: Any = dist.ProcessGroup  # its stubs have none of what torch's own Python functions call


class SharedGpuGroup(_ProcessGroup):
    """Collectives on copies in host memory, which have ended when a call returns.

    The methods are those that torch 2.11 to 2.13 call, in its Python functions and its functional collectives; each
    ``options`` is torch's own, or missing.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._host: Any = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._store, self._name = store, ""

    def getBackendName(self) -> str:
        return BACKEND

    def get_group_store(self) -> dist.Store:
        return self._store

    def getGroupName(self) -> str:
        return self._name

    def setGroupName(self, name: str) -> None:
        self._name = name

    def allreduce(self, tensors: Sequence[Tensor], *options: Any) -> dist.Work:
        return _through_host(tensors, lambda host: self._host.allreduce(host, *options))

    def allreduce_coalesced(self, tensors: Sequence[Tensor], *options: Any) -> dist.Work:
        one: Any = dist.AllreduceOptions()
        one.reduceOp = options[0].reduceOp if options else dist.ReduceOp.SUM
        return _last(self.allreduce([tensor], one) for tensor in tensors)

    def broadcast(self, tensors: Sequence[Tensor], *options: Any) -> dist.Work:
        return _through_host(tensors, lambda host: self._host.broadcast(host, *options))

    def allgather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], *options: Any) -> dist.Work:
        (parts,), sent = outputs, _on_host(inputs)
        return _through_host(parts, lambda host: self._host.allgather([host], sent, *options))

    def _allgather_base(self, output: Tensor, source: Tensor, *options: Any) -> dist.Work:
        (sent,) = _on_host([source])
        return _through_host([output], lambda host: self._host._allgather_base(host[0], sent, *options))

    def allgather_into_tensor_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], *options: Any
    ) -> dist.Work:
        return _last(self._allgather_base(*pair, *options) for pair in zip(outputs, inputs, strict=True))

    def _reduce_scatter_base(self, output: Tensor, source: Tensor, *options: Any) -> dist.Work:
        (sent,) = _on_host([source])
        return _through_host([output], lambda host: self._host._reduce_scatter_base(host[0], sent, *options))

    def reduce_scatter_tensor_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], *options: Any
    ) -> dist.Work:
        return _last(self._reduce_scatter_base(*pair, *options) for pair in zip(outputs, inputs, strict=True))

    def alltoall_base(
        self, output: Tensor, source: Tensor, output_sizes: list[int], input_sizes: list[int], *options: Any
    ) -> dist.Work:
        (sent,) = _on_host([source])
        return _through_host(
            [output], lambda host: self._host.alltoall_base(host[0], sent, output_sizes, input_sizes, *options)
        )

    def barrier(self, opts: Any = None) -> dist.Work:
        work = self._host.barrier(opts or dist.BarrierOptions())
        work.wait()
        return work

    # torch 2.13's names for the same
    all_gather_single = _allgather_base
    all_gather_single_coalesced = allgather_into_tensor_coalesced
    reduce_scatter_single = _reduce_scatter_base
    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced
    all_to_all_single = alltoall_base


def register() -> None:
    """Make the backend known to ``torch.distributed.init_process_group`` in this process."""
    dist.Backend.register_backend(BACKEND, SharedGpuGroup, devices=["cpu", "cuda"])


def _on_host(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.detach().cpu().contiguous() for tensor in tensors]


def _through_host(outputs: Sequence[Tensor], collective: Callable[[list[Tensor]], dist.Work]) -> dist.Work:
    """Run ``collective`` on copies of ``outputs``, which then get what it wrote."""
    host = _on_host(outputs)
    work = collective(host)
    work.wait()
    with torch.no_grad():
        for output, value in zip(outputs, host, strict=True):
            output.copy_(value)
    return work


def _last(works: Iterable[dist.Work]) -> dist.Work:
    """All of them have ended, so any stands for all."""
    *_, last = works
    return last
