"""FSDP2 on thousands of ranks, for models without data.

FSDP2 cuts every parameter into as many chunks as there are ranks, and keeps one. On the meta device that takes longer
than everything else together: 2048 tensors for each of the thousand parameters of a 405B Llama, twice, to learn a
shape. Chunks without data that have one shape may as well be one tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class MetaChunks(TorchFunctionMode):
    """Inside, ``torch.chunk`` of a tensor on meta makes at most three tensors, each as often as it is asked for.

    Shapes are those of ``torch.chunk``. Where that would return fewer chunks than asked for, empty ones follow: FSDP2
    adds those itself, one by one.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.chunk and args and args[0].is_meta and args[0].numel():
            return _chunks(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _chunks(x: Tensor, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
    length = x.shape[dim]
    size = -(-length // chunks)
    full, rest = divmod(length, size)
    found = (x.narrow(dim, 0, size),) * full
    if rest:
        found += (x.narrow(dim, full * size, rest),)
    return found + (x.new_empty(0),) * (chunks - len(found))
