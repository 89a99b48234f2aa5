"""Where two runs of a model part ways."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from shardwright.verify.compare import EXACT, relative_error
from shardwright.verify.step import full, seed_all


def first_module_that_differs(
    reference: nn.Module, sharded: nn.Module, batch: Mapping[str, Any]
) -> tuple[str, float] | None:
    """The first module, in order of execution, whose output differs, with the relative error; None if none does.

    A module whose output is this rank's part only (a column-parallel layer) cannot be compared and is passed over: the
    first module downstream that has a whole output shows its mistakes. Call it with the same batch on every rank.
    """
    expected = _outputs(reference, batch)
    found = _outputs(sharded, batch)
    errors = {
        name: relative_error(output, expected[name])
        for name, output in found.items()
        if name in expected and expected[name].shape == output.shape
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, errors)
    for name in expected:
        per_rank = [theirs.get(name) for theirs in everyone]
        # Ranks that differ from one another hold parts of a sum, or parts of the output that happen to have its shape.
        whole = all(error is not None and math.isclose(error, per_rank[0], rel_tol=1e-2) for error in per_rank)
        if whole and not per_rank[0] < EXACT:
            return name, per_rank[0]
    return None


def _outputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Module name -> first tensor of its first output, whole, in order of completion."""
    outputs: dict[str, torch.Tensor] = {}

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = _first_tensor(output)
            if name not in outputs and tensor is not None and tensor.is_floating_point():
                outputs[name] = full(tensor) if isinstance(tensor, DTensor) else tensor.detach().clone()

        return hook

    seed_all(0)  # LayerDrop draws the same layers in both
    handles = [module.register_forward_hook(hook_for(name)) for name, module in model.named_modules() if name]
    model(**batch)
    for handle in handles:
        handle.remove()
    return outputs


def _first_tensor(output: Any) -> torch.Tensor | None:
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        output = next((item for item in output if isinstance(item, torch.Tensor)), None)
    return output if isinstance(output, torch.Tensor) else None
