"""Weights for a model on the meta device, made module by module while the package shards it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from shardwright._torch import local_tensor
from shardwright._transformers import own_initialiser
from shardwright.distributed.models.ties import Tie, find_ties
from shardwright.errors import UnsupportedError

Initialiser = Callable[[nn.Module], None]


def initialiser_of(model: nn.Module) -> Initialiser:
    """How the weights and buffers of one module of ``model`` are set.

    A Hugging Face model's own ``_init_weights``; else the module's ``reset_parameters``.

    Raises:
        UnsupportedError: modules with meta tensors that neither can set; the message names them.
    """
    own = own_initialiser(model)
    if own is not None:
        return own
    helpless = [
        name
        for name, module in model.named_modules()
        if any(x is not None and x.is_meta for x in (*module._parameters.values(), *module._buffers.values()))
        and not callable(getattr(module, "reset_parameters", None))
    ]
    if helpless:
        raise UnsupportedError(
            f"{len(helpless)} modules of this {type(model).__name__} on the meta device have no reset_parameters() to "
            f"set their weights with: {', '.join(helpless[:5])}. Give their classes one, or build the model "
            "on a device."
        )
    return lambda module: module.reset_parameters()  # type: ignore[operator]


@contextmanager
def initialised(model: nn.Module, initialise: Initialiser, device: torch.device) -> Iterator[None]:
    """Let the package, inside, set the weights of ``model`` when it comes to them; buffers are set on exit.

    The weights do not depend on how the model is cut: every rank draws whole weights from the same random numbers and
    keeps its part.
    """
    ties = find_ties(model)
    owners = [
        module for module in model.modules() if any(p is not None and p.is_meta for p in module._parameters.values())
    ]
    for module in owners:
        module.__dict__["reset_parameters"] = _Reset(model, module, initialise, ties, device)
    cuda = [device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(_common_seed(device))
        try:
            yield
        finally:
            for module in owners:
                del module.__dict__["reset_parameters"]
        _set_buffers(model, initialise, device)


class _Reset:
    """``module.reset_parameters`` for the package, which has just given the module empty weights on the device."""

    def __init__(
        self, model: nn.Module, module: nn.Module, initialise: Initialiser, ties: list[Tie], device: torch.device
    ) -> None:
        self.model, self.module, self.initialise, self.ties, self.device = model, module, initialise, ties, device

    def __call__(self) -> None:
        module = self.module
        del module.__dict__["reset_parameters"]  # the module's own, for the moment
        parts: dict[str, Any] = dict(module._parameters)
        whole = {name: self._whole(param) for name, param in parts.items() if isinstance(param, DTensor)}
        module._parameters.update(whole)
        with torch.no_grad():
            self.initialise(module)
        module._parameters.update(parts)
        for name, full in whole.items():
            part = parts[name]
            cut = distribute_tensor(full.detach(), part.device_mesh, part.placements, src_data_rank=None)
            local_tensor(part).copy_(cut.to_local())
        module.__dict__["reset_parameters"] = self
        self._restore_ties()

    def _whole(self, param: DTensor) -> nn.Parameter:
        return nn.Parameter(torch.empty(param.shape, dtype=param.dtype, device=self.device), param.requires_grad)

    def _restore_ties(self) -> None:
        for tie in self.ties:
            for path, name in tie.places:
                if self.model.get_submodule(path) is self.module:
                    for other, other_name in tie.places:
                        self.model.get_submodule(other)._parameters[other_name] = self.module._parameters[name]


def _set_buffers(model: nn.Module, initialise: Initialiser, device: torch.device) -> None:
    for module in model.modules():
        missing = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        for name in missing:
            module._buffers[name] = torch.empty_like(_present(module._buffers[name]), device=device)
        if missing:
            with torch.no_grad():
                initialise(module)


def _present(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def _common_seed(device: torch.device) -> int:
    """A seed that is the same on every rank, drawn from rank 0's random numbers."""
    seed = torch.randint(2**62, (), dtype=torch.int64).to(device)
    dist.broadcast(seed, 0)
    return int(seed.item())
