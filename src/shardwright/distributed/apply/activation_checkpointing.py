"""Activation checkpointing of whole blocks: recompute in backward what need not be kept.

Non-reentrant checkpoints only: reentrant ones run FSDP's all-gathers a second time. They go inside the module, around
its forward, so module names stay and FSDP2's hooks run outside of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from shardwright._torch import attention_kernels, functional_collectives, version_of
from shardwright.distributed.apply.offload import HostMemory
from shardwright.distributed.runtime.forward import Around, Forward, wrap_forward
from shardwright.distributed.runtime.regions import first_argument, on_first_tensor
from shardwright.distributed.runtime.without_cache import train_without_cache

Contexts = Callable[[], tuple[AbstractContextManager, AbstractContextManager]]

_aten = torch.ops.aten
PRODUCTS = (_aten.mm.default, _aten.bmm.default, _aten.addmm.default)
# Results worth their memory: matrix products, attention, and what the network sent.
SAVED = (
    *PRODUCTS,
    *attention_kernels(),
    functional_collectives.all_reduce.default,
    functional_collectives.all_gather_into_tensor.default,
    functional_collectives.reduce_scatter_tensor.default,
    functional_collectives.wait_tensor.default,
)


class _Checkpointed(Around):
    eager = True

    def __init__(self, *, selective: int, host: HostMemory | None) -> None:
        self.selective = selective
        self.host = host

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not (module.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        contexts: Contexts = noop_context_fn
        if self.selective:
            contexts = partial(create_selective_checkpoint_contexts, _Policy(self.selective))
        owners = [] if torch.compiler.is_compiling() else [each for each in module.modules() if each._buffers]
        if owners:
            contexts = partial(_with_buffers, contexts, owners)
        if self.host is None:
            return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False, context_fn=contexts)
        # The residual stream is what waits on the host; masks and the like are the same tensors for all blocks.
        first = first_argument(module)
        streams: list[Any] = []
        without = on_first_tensor(streams.append, first, args, kwargs)  # nothing here holds on to it

        def run(stream: Any) -> Any:
            args, kwargs = on_first_tensor(lambda _: stream, first, *without)
            return forward(*args, **kwargs)

        with self.host.keeps():
            return checkpoint(run, *streams, use_reentrant=False, context_fn=contexts)


def _with_buffers(contexts: Contexts, owners: list[nn.Module]) -> tuple[AbstractContextManager, AbstractContextManager]:
    """``contexts``, and a repetition that leaves nothing more in buffers (running statistics, counters)."""
    first, again = contexts()
    watched = _Watched(first, owners)
    return watched, _Restored(again, watched)


class _Watched(AbstractContextManager[None]):
    """Finds the modules that update their buffers."""

    def __init__(self, inner: AbstractContextManager, owners: list[nn.Module]) -> None:
        self._inner, self._owners = inner, owners
        self.updated: list[nn.Module] = []

    def __enter__(self) -> None:
        self._before = [_versions(owner) for owner in self._owners]
        self._inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._inner.__exit__(*error)
        # All buffers of a module that changed one: batch norm's kernel writes its statistics without a new version.
        self.updated = [owner for owner, was in zip(self._owners, self._before, strict=True) if _versions(owner) != was]


class _Restored(AbstractContextManager[None]):
    """Gives them the buffers back that they had on entry."""

    def __init__(self, inner: AbstractContextManager, watched: _Watched) -> None:
        self._inner, self._watched = inner, watched

    def __enter__(self) -> None:
        self._kept = [
            (owner, name, buffer, buffer.clone())
            for owner in self._watched.updated
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]
        self._inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._inner.__exit__(*error)
        with torch.no_grad():
            for owner, name, buffer, content in self._kept:
                owner._buffers[name] = buffer
                buffer.copy_(content)


def _versions(owner: nn.Module) -> list[tuple[int, int]]:
    return [(id(buffer), version_of(buffer)) for buffer in owner._buffers.values() if buffer is not None]


class _Policy:
    """What one call of a block saves. The products are counted, in the same order in the call and in its repetition."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._products: Counter[bool] = Counter()

    def __call__(self, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        saves = op in SAVED
        if op in PRODUCTS:
            saves = self._products[context.is_recompute] % self._every == 0
            self._products[context.is_recompute] += 1
        return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE


def apply_activation_checkpointing(
    model: nn.Module, blocks: Iterable[str], *, selective: int = 0, offload: bool = False
) -> None:
    """Recompute the named blocks in backward, in place.

    Args:
        selective: keep the results of attention, collectives and every ``selective``-th matrix product, so that none
            of these runs twice; 0: a block's input only.
        offload: let the inputs wait in host memory (:mod:`.offload`).
    """
    train_without_cache(model, refuse=True)
    host = HostMemory() if offload else None
    for name in blocks:
        wrap_forward(model.get_submodule(name), _Checkpointed(selective=selective, host=host))
