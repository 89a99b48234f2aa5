"""Values of all data-parallel ranks: ranks that share a batch have the same ones, which count once."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import recursively_apply
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shardwright.distributed.runtime.layout import whole


def plain(data: Any) -> Any:
    """``data`` (nested lists, tuples, mappings of anything) with every DTensor in it gathered; a collective."""
    return recursively_apply(whole, data, test_type=lambda value: isinstance(value, DTensor))


def gather(data: Any, batches: DeviceMesh | None) -> Any:
    """Every tensor in ``data`` with those of the other data-parallel ranks behind it, along dim 0, by rank."""

    def one(tensor: Tensor) -> Tensor:
        tensor = tensor[None] if tensor.ndim == 0 else tensor.contiguous()
        if batches is None or batches.size() == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(batches.size())]
        dist.all_gather(parts, tensor, group=batches.get_group())
        return torch.cat(parts)

    return recursively_apply(one, plain(data), error_on_other_type=True)


def gather_objects(data: Any, batches: DeviceMesh | None) -> list[Any]:
    """The lists of all data-parallel ranks, one behind the other."""
    if batches is None or batches.size() == 1:
        return list(data)
    parts: list[Any] = [None] * batches.size()
    dist.all_gather_object(parts, data, group=batches.get_group())
    return [value for part in parts for value in part]


def reduce(data: Any, reduction: str, scale: float, batches: DeviceMesh | None) -> Any:
    """Every tensor in ``data`` summed (``"mean"``: averaged) over the data-parallel ranks, times ``scale``."""

    def one(tensor: Tensor) -> Tensor:
        result = tensor.clone()
        if batches is None or batches.size() == 1:
            return result * scale if reduction != "none" else result
        if reduction == "none":
            return result
        dist.all_reduce(result, group=batches.get_group())
        result = result * scale
        return result / batches.size() if reduction == "mean" else result

    return recursively_apply(one, plain(data), error_on_other_type=True)
