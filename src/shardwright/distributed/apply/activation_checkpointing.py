"""Activation checkpointing of whole blocks: recompute in backward what need not be kept.

Non-reentrant checkpoints only: reentrant ones run FSDP's all-gathers a second time. They go inside the module, around
its forward, so module names stay and FSDP2's hooks run outside of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from shardwright.distributed.styles.forward import Around, Forward, wrap_forward
from shardwright.distributed.styles.without_cache import train_without_cache

_aten = torch.ops.aten
_collectives = torch.ops._c10d_functional
# Results worth their memory: matrix products, attention, and what the network sent.
SAVED = (
    _aten.mm.default,
    _aten.bmm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _collectives.all_reduce.default,
    _collectives.all_gather_into_tensor.default,
    _collectives.reduce_scatter_tensor.default,
    _collectives.wait_tensor.default,
)


class _Checkpointed(Around):
    eager = True

    def __init__(self, *, selective: bool) -> None:
        self.selective = selective

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not (module.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        options: dict[str, Any] = {}
        if self.selective:
            options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
        return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False, **options)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in SAVED else CheckpointPolicy.PREFER_RECOMPUTE


def apply_activation_checkpointing(model: nn.Module, blocks: Iterable[str], *, selective: bool = False) -> None:
    """Recompute the named blocks in backward, in place.

    Args:
        selective: keep the results of matrix products, attention and collectives, so that none of these runs twice;
            otherwise a block's input only.
    """
    train_without_cache(model, refuse=True)
    for name in blocks:
        wrap_forward(model.get_submodule(name), _Checkpointed(selective=selective))
