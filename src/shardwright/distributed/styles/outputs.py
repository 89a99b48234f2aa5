"""What a sharded model returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shardwright.distributed.styles.forward import Around, Forward
from shardwright.distributed.styles.logits import ShardedLogits


class PlainOutputs(Around):
    """Hands out plain tensors, except for logits of a training step.

    Logits stay sharded on the vocabulary while gradients are recorded, or where the model has already computed its loss
    from them; otherwise (generation, scoring) they come whole. Hidden states that are split along the sequence come
    whole.
    """

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = forward(*args, **kwargs)
        keep_logits = torch.is_grad_enabled() or kwargs.get("labels") is not None
        return _plain(result, keep_logits)


def _plain(value: Any, keep_logits: bool) -> Any:
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
