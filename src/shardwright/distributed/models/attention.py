"""transformers' table of attention functions: what a module would call, and a function of ours in it.

Modeling files ask ``ALL_ATTENTION_FUNCTIONS`` (some have one of their own) for the function that the config names, and
fall back to an ``eager_attention_forward`` of their own. Seen in transformers 5.17 and 5.23.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import AttentionInterface, PreTrainedConfig

from shardwright._transformers import attention_of
from shardwright.distributed.runtime.context.attention import KERNELS, Kernel, KernelName, context_attention
from shardwright.distributed.runtime.forward import original_class
from shardwright.errors import PlanError


def register_context_attention() -> None:
    """Let modules find :func:`context_attention` under its names."""
    for name in KERNELS:
        AttentionInterface.register(KernelName(name), context_attention)


def attention_kernels(model: nn.Module, names: Mapping[str, str]) -> dict[str, Kernel]:
    """The functions that modules of ``model`` call by these names, by module.

    Raises:
        PlanError: a module's file has no table of them.
    """
    found = {module: attention_kernel(model.get_submodule(module), name) for module, name in names.items()}
    if missing := [module for module, kernel in found.items() if kernel is None]:
        raise PlanError(f"{', '.join(missing)} does not take its attention function from transformers' table.")
    return {module: kernel for module, kernel in found.items() if kernel is not None}


def attention_name(module: nn.Module) -> str | None:
    """What the config that ``module`` holds calls its attention function; None where it holds none."""
    config = module.__dict__.get("config")
    return attention_of(config) or None if isinstance(config, PreTrainedConfig) else None


def attention_kernel(module: nn.Module, name: str) -> Kernel | None:
    """The function that ``module`` calls by the name of ``name``; None where its file has no table of them."""
    names: dict[str, Any] = inspect.unwrap(original_class(module).forward).__globals__
    table, eager = names.get("ALL_ATTENTION_FUNCTIONS"), names.get("eager_attention_forward")
    if not isinstance(table, AttentionInterface) or eager is None:
        return None
    found: Kernel = table.get_interface(name, eager)
    return found
