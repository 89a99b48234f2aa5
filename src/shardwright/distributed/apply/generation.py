"""Text that the ranks of a tensor-parallel group generate together: one text, whatever their random states are.

Tokens are drawn outside of the model, by every rank for itself, from logits that are equal on all. Ranks with other
random states would draw other tokens and feed them to one model between them, which computes without an error what is
no model's text. So ``generate`` draws alike on every rank; and each call of the model outside of a training step
compares its integer inputs over the group, for loops that draw by themselves.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardwright._torch import tree_leaves
from shardwright.distributed.runtime import collectives as c
from shardwright.distributed.runtime.forward import Around, Forward, wrap_forward, wrap_method
from shardwright.distributed.runtime.random_states import drawing_alike
from shardwright.errors import ConfigError

_INTEGERS = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_WRAP = 1 << 63


def generate_together(model: nn.Module, mesh: DeviceMesh) -> None:
    """Make the ranks of ``mesh`` generate one text, in place.

    ``generate`` runs with the random states of the group's first rank (:func:`.drawing_alike`). Any call of ``model``
    without gradients, or in evaluation, raises ConfigError on every rank where the ranks were given different ids: one
    small collective more. A training step is left as it is.
    """
    for module in model.modules():
        wrap_method(module, "generate", _DrawsAlike(mesh))
    if dist.get_backend(mesh.get_group()) != "fake":
        wrap_forward(model, _SameIds(mesh))


class _DrawsAlike(Around):
    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with drawing_alike(self.mesh):
            return forward(*args, **kwargs)


class _SameIds(Around):
    def __init__(self, mesh: DeviceMesh) -> None:
        self.group, self.device = c.Group.of(mesh), mesh.device_type

    @torch.compiler.disable
    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not (module.training and torch.is_grad_enabled()):
            self._compare(args, kwargs)
        return forward(*args, **kwargs)

    def _compare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mine = checksum([x for x in tree_leaves((args, dict(sorted(kwargs.items())))) if _has_ids(x)], self.device)
        sums = c.all_gather(mine, 0, self.group.size, self.group).tolist()
        if len(set(sums)) > 1:
            other = next(rank for rank, value in enumerate(sums) if value != sums[0])
            raise ConfigError(
                f"Ranks 0 and {other} of a tensor-parallel group called the model with different ids. Such a group "
                "works on one batch together, and generates one text. Draw every token on one rank and send it to the "
                "others (torch.distributed.broadcast over mesh['tp'].get_group()), or seed them alike: "
                "torch.manual_seed(seed + mesh['dp'].get_local_rank()). model.generate(...) sees to this by itself."
            )


def _has_ids(x: Any) -> bool:
    return type(x) is Tensor and x.dtype in _INTEGERS and x.layout is torch.strided and not x.is_meta


@torch.no_grad()
def checksum(tensors: list[Tensor], device: str) -> Tensor:
    """An int64 ``[1]`` over shapes and values in their order, equal where these are equal; computed on ``device``."""
    total = torch.zeros(1, dtype=torch.int64, device=device)
    for tensor in tensors:
        values = tensor.to(device).reshape(-1).long()
        places = torch.arange(1, values.numel() + 1, device=device)
        total = _mixed(total + hash(tuple(tensor.shape)) % _WRAP)
        # Mixed together with its place, so that neither an exchange nor changes that cancel out leave the sum alone.
        total = total + _mixed(_mixed(places) + values).sum()
    return total


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 64-bit integers under which near ones go far apart (the finaliser of SplitMix64)."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
