"""Do all ranks hold the same model? Checked once, before parameters are cut without sending any."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shardwright.errors import PlanError

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per element
_CHUNK = 2**18  # elements that are added up at once: 4 MB beside the tensor itself


def check_agreement(model: nn.Module, mesh: DeviceMesh, description: str) -> None:
    """Raise, on every rank of ``mesh`` alike, unless all hold the same model and the same ``description``.

    Compares names, shapes, dtypes and what is frozen, of all parameters and buffers (also those that no checkpoint
    has, such as rotary frequencies), and a checksum over the bits of each that is not on ``meta``. A digest goes round
    every axis of the mesh; the details only where digests differ.

    Args:
        description: anything else that must be equal, as text (the resolved plan).

    Raises:
        PlanError: naming the first difference and the rank that has it.
    """
    groups = [mesh.get_group(axis) for axis in range(mesh.ndim) if mesh.size(axis) > 1]
    if any(dist.get_backend(group) == "fake" for group in groups):
        return  # nothing is exchanged in a fake process group
    fingerprint = _fingerprint(model, description)
    problem: str | None = None
    digest = hashlib.sha256(json.dumps(fingerprint).encode()).hexdigest()
    for group in groups:
        states = _exchange((digest, problem), group)
        known = next((found for _, found in states if found is not None), None)
        if known is None and len({theirs for theirs, _ in states}) > 1:
            known = _first_difference(_exchange(fingerprint, group), dist.get_process_group_ranks(group))
        problem = problem or known
    if problem is not None:
        raise PlanError(problem)


def _exchange(value: Any, group: dist.ProcessGroup) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, value, group=group)
    return everyone


def _first_difference(everyone: list[dict[str, str]], ranks: list[int]) -> str:
    first = everyone[0]
    for rank, theirs in zip(ranks, everyone, strict=True):
        for key in {**first, **theirs}:
            ours, other = first.get(key, "missing"), theirs.get(key, "missing")
            if ours != other:
                return (
                    f"Ranks {ranks[0]} and {rank} do not hold the same model: {key} is {ours} on rank {ranks[0]} and "
                    f"{other} on rank {rank}. Build the model with the same config and the same seed on every rank (or "
                    "load the same weights), and pass the same plan."
                )
    raise AssertionError("the digests differ, but nothing else does")


def _fingerprint(model: nn.Module, description: str) -> dict[str, str]:
    result = {"the plan": hashlib.sha256(description.encode()).hexdigest()[:12]}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    multipliers = {device: _multipliers(device) for device in {tensor.device for _, tensor in tensors}}
    for name, tensor in tensors:
        kind = ("trained" if tensor.requires_grad else "frozen") if isinstance(tensor, nn.Parameter) else "buffer"
        if isinstance(tensor, DTensor):  # cut by the caller: the ranks' parts are not equal
            values = f"with placements {tensor.placements}"
        else:
            values = "on meta" if tensor.is_meta else f"with checksum {_checksum(tensor, multipliers[tensor.device])}"
        result[name] = f"{tuple(tensor.shape)} {tensor.dtype} {kind} {values}"
    return result


@torch.no_grad()
def _checksum(tensor: Tensor, multipliers: Tensor) -> str:
    """12 hex digits over the bits of ``tensor`` in their order: values that change places change it.

    Every chunk of elements, taken as integers, is multiplied with ``multipliers`` and added up modulo 2**64, which is
    the same on every device and in any order of addition; SHA-256 goes over the sums.
    """
    plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    bits = plain.detach().contiguous().view(-1).view(_INTEGERS[plain.element_size()])
    sums = [(chunk.long() * multipliers[: len(chunk)]).sum() for chunk in bits.split(_CHUNK)]
    return hashlib.sha256(json.dumps(torch.stack(sums).tolist()).encode()).hexdigest()[:12]


def _multipliers(device: torch.device) -> Tensor:
    """A fixed pseudo-random 64-bit number for every place in a chunk, int64 ``[_CHUNK]``."""
    if device.type == "meta":
        return torch.empty(0, device=device)
    generator = torch.Generator().manual_seed(0x5A4D)
    return torch.randint(-(2**63), 2**63 - 1, (_CHUNK,), generator=generator).to(device)
