"""The dtype in which torch would hand out a result, under autocast too: asked of torch, with tensors of a few elements.

What Shardwright computes on shards is made of other operations than torch's own, so torch's rules for the operation
(its autocast lists, which differ by device and version) do not reach it. Each is looked up here once, and followed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def result_dtype(function: Callable[..., Tensor], x: Tensor) -> torch.dtype:
    """The dtype of ``function(x)``, were ``x`` two elements long in every dim, with the autocast that is on now.

    Args:
        function: a function at the top level of a module, which the answer is kept for.
    """
    device = x.device.type
    if not torch.amp.is_autocast_available(device):  # the meta device
        return _asked(function, "cpu", x.dtype, x.ndim, None)
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return _asked(function, device, x.dtype, x.ndim, autocast)


@cache
def _asked(
    function: Callable[..., Tensor], device: str, dtype: torch.dtype, ndim: int, autocast: torch.dtype | None
) -> torch.dtype:
    with torch.no_grad():  # autocast is as its argument says: that is what the answer is kept under
        return function(torch.zeros((2,) * ndim, dtype=dtype, device=device)).dtype


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """What torch's kernels compute in for a result of ``dtype``: they round once, at the end."""
    return torch.float32 if dtype in HALF else dtype
