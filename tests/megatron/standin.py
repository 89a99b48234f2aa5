"""What a CPU build of torch lacks of ``torch.cuda``, so that the real megatron-fsdp trains on gloo ranks.

Everything runs in the order it is written, so streams have nothing to order and events nothing to wait for. gloo's
threads would not keep to it: the package frees a buffer in stream order, without waiting for a collective that still
writes to it. So each collective is waited for where it starts. Lives in the tests only: production code refuses a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed import _coalescing_manager

from shardwright.distributed.apply.megatron_fsdp import availability


class Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def record(self, *_: Any) -> None: ...


class Stream:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def record_event(self, *_: Any) -> Event:
        return Event()


def buffer_on_cpu(self: Any, shape: Any, dtype: torch.dtype, name: str, mem_alloc_context: Any = None) -> torch.Tensor:
    """The package's buffers that stay for good, which it takes from the current GPU."""
    size = math.prod(shape)
    if (name, dtype) not in self.buffer or self.buffer[name, dtype].numel() < size:
        self.buffer[name, dtype] = torch.empty(size, dtype=dtype)
    return self.buffer[name, dtype][:size].view(*shape)


@contextmanager
def coalesced(*args: Any, async_ops: bool = False, **kwargs: Any) -> Iterator[Any]:
    with _coalescing_manager(*args, async_ops=async_ops, **kwargs) as manager:
        yield manager
    if async_ops:
        manager.wait()


@contextmanager
def cuda_standin() -> Iterator[None]:
    """Let megatron-fsdp run on CPU tensors inside; everything is as before on exit."""
    stream = Stream()
    replaced: dict[str, Any] = {
        "current_device": lambda: 0,
        "Stream": Stream,
        "current_stream": lambda *_: stream,
        "stream": lambda _: nullcontext(),
        "synchronize": lambda *_: None,
    }
    with ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(torch.Tensor, "cuda", lambda self, *_, **__: self))
        stack.enter_context(patch("megatron_fsdp.utils.GlobalMemoryBuffer.get_tensor", buffer_on_cpu))
        stack.enter_context(patch("megatron_fsdp.param_and_grad_buffer._coalescing_manager", coalesced))
        stack.enter_context(patch.object(availability, "DEVICE_TYPES", ("cpu",)))
        yield
