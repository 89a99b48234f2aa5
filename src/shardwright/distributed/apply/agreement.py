"""Do all ranks hold the same model? Checked once, before parameters are cut without sending any."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from shardwright.errors import PlanError


def check_agreement(model: nn.Module, mesh: DeviceMesh, description: str) -> None:
    """Raise, on every rank of ``mesh`` alike, unless all hold the same parameters and the same ``description``.

    Compares names, shapes, dtypes, what is frozen and, for parameters that are not on ``meta``, a sum over the values.
    A digest goes round every axis of the mesh; the details only where digests differ.

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
    for name, param in model.named_parameters():
        values = "on meta" if param.is_meta else f"summing to {_checksum(param):.17g}"
        kind = "trained" if param.requires_grad else "frozen"
        result[name] = f"{tuple(param.shape)} {param.dtype} {kind} {values}"
    return result


@torch.no_grad()
def _checksum(param: torch.Tensor) -> float:
    return param.sum(dtype=torch.float64).item()
