"""What a sharded model returns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shardwright.distributed.runtime import collectives as c
from shardwright.distributed.runtime.forward import Around, Forward
from shardwright.distributed.runtime.implicit import OwnRules
from shardwright.distributed.runtime.logits import ShardedLogits
from shardwright.errors import UnsupportedError


class PlainOutputs(Around):
    """Hands out plain tensors, except for logits of a training step.

    Logits stay sharded on the vocabulary while gradients are recorded, or where the model has already computed its loss
    from them; otherwise (generation, scoring) they come whole. Hidden states that are split along the sequence come
    whole.

    Attention weights are of this rank's heads inside; those of all heads are handed out.

    ``torch.compile(model)`` leaves the model uncompiled here: it cannot follow DTensors that become another class.
    Blocks are compiled one by one (``ParallelConfig.compile``).

    Args:
        heads: the numbers of attention heads that layers of the model have.
    """

    def __init__(self, heads: Iterable[int], mesh: DeviceMesh) -> None:
        self.heads = frozenset(heads)
        self.group = c.Group.of(mesh)

    @torch.compiler.disable
    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = forward(*args, **kwargs)
        keep_logits = torch.is_grad_enabled() or kwargs.get("labels") is not None
        return self._all_heads(_plain(result, keep_logits))

    def _all_heads(self, result: Any) -> Any:
        """``result`` with every tuple of attention weights ``[batch, heads, queries, keys]`` whole."""
        if isinstance(result, dict):
            for key, item in result.items():
                if self._of_local_heads(item):
                    result[key] = self._gathered(item)
            return result
        if type(result) is tuple:
            return tuple(self._gathered(item) if self._of_local_heads(item) else item for item in result)
        return result

    def _of_local_heads(self, item: Any) -> bool:
        tensors = [x for x in item if isinstance(x, Tensor)] if type(item) is tuple else []
        return any(x.ndim == 4 and x.shape[1] * self.group.size in self.heads for x in tensors)

    def _gathered(self, weights: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(self.heads) > 1:
            raise UnsupportedError(
                "Attention weights of a model whose layers have different numbers of heads cannot be told apart from "
                "those of one rank's heads. Call it without output_attentions."
            )
        (heads,) = self.heads
        local = heads // self.group.size
        return tuple(
            c.gather(x, 1, heads, self.group, partial_grad=False)
            if isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] == local
            else x
            for x in weights
        )


def _plain(value: Any, keep_logits: bool) -> Any:
    if isinstance(value, OwnRules):
        return value  # split along the sequence, too: context parallelism, which is around this, sees to it
    if isinstance(value, ShardedLogits):
        return value if keep_logits else value.full_tensor()
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        for key, item in value.items():
            plain = _plain(item, keep_logits)
            if plain is not item:
                value[key] = plain
        return value
    if type(value) in (tuple, list):
        return type(value)(_plain(item, keep_logits) for item in value)
    return value
