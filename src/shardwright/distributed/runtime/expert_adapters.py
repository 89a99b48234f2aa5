"""Adapters on stacked experts (LoRA by PEFT's ``target_parameters``) where a rank has some of the experts.

PEFT's layer around the experts adds ``lora_B @ lora_A`` of every expert to their weights. Both matrices hold all
experts: ``lora_A`` is ``[experts * r, in]``, expert by expert, and ``lora_B`` is ``[out, r * experts]``, with all
experts' columns of one ``r`` side by side. They are small, and stay what they are without ``ep``: parameters of the
block. Here the layer sees the part of its rank's experts, and its own code adds it. The other experts' part of the
gradient comes from the other ranks, so that FSDP2's sum over all ranks is whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from shardwright.distributed.runtime.adapted import BASE, DOWN, UP
from shardwright.distributed.runtime.forward import attributes_as, local_parameters, parameters_as


@contextmanager
def adapters_of(layer: nn.Module, experts: int, start: int, end: int) -> Iterator[None]:
    """Inside, PEFT's layers around stacked experts have the adapters of the experts from ``start`` to ``end``.

    Args:
        layer: the outermost of the layers, or the experts themselves, for which nothing is done.
        experts: how many there are.
    """
    if BASE not in layer._modules:
        yield
        return
    with ExitStack() as inside:
        while BASE in layer._modules:
            inside.enter_context(attributes_as(layer, {"num_experts": end - start}))
            for name, of in ((DOWN, _rows), (UP, _columns)):
                for part in layer.get_submodule(name).children():
                    (weight,) = local_parameters(part).values()
                    inside.enter_context(parameters_as(part, {"weight": of(weight, experts, start, end)}))
            layer = layer.get_submodule(BASE)
        names, buffers = list(layer._parameters), set(layer._buffers)
        try:
            yield
        finally:
            # PEFT takes the weights away and puts them back: behind the others, and as buffers, since here they are no
            # parameters. All ranks keep the order, those whose experts got no tokens, too.
            moved = {name: layer._buffers.pop(name) for name in layer._buffers.keys() - buffers}
            left: dict[str, Any] = {**layer._parameters, **moved}
            layer._parameters.clear()
            layer._parameters.update({name: left[name] for name in names})


def _rows(weight: Tensor, experts: int, start: int, end: int) -> Tensor:
    return weight.unflatten(0, (experts, -1))[start:end].flatten(0, 1)


def _columns(weight: Tensor, experts: int, start: int, end: int) -> Tensor:
    return weight.unflatten(1, (-1, experts))[:, :, start:end].flatten(1)
