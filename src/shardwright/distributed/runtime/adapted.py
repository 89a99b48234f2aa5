"""Linear layers that something was put around: PEFT's tuner layers keep the layer that they adapt as ``base_layer``."""

from __future__ import annotations

from torch import nn

BASE = "base_layer"
DOWN, UP = "lora_A", "lora_B"


def base_layer(module: nn.Module) -> nn.Module:
    """The layer inside of ``module`` that it adapts; ``module`` itself, where it adapts none."""
    inner = module._modules.get(BASE)
    return module if inner is None else base_layer(inner)
