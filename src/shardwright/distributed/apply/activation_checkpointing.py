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
from torch import Tensor, nn
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
    """``contexts``, and a repetition that reads the buffers that the first run read, and leaves nothing more in them.

    Running statistics and counters are then updated once, and a router that chooses by its counters chooses alike.
    """
    first, again = contexts()
    watched = _Watched(first, owners)
    return watched, _AsBefore(again, watched)


class _Watched(AbstractContextManager[None]):
    """Finds the modules that update their buffers, and keeps what was in these before."""

    def __init__(self, inner: AbstractContextManager, owners: list[nn.Module]) -> None:
        self._inner, self._owners = inner, owners
        self.updated: list[tuple[nn.Module, dict[str, Tensor]]] = []

    def __enter__(self) -> None:
        before = zip(self._owners, _copies([_buffers(owner) for owner in self._owners]), strict=True)
        self._before = [(owner, content, _versions(owner)) for owner, content in before]
        self._inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._inner.__exit__(*error)
        # All buffers of a module that changed one: batch norm's kernel writes its statistics without a new version.
        self.updated = [(owner, content) for owner, content, was in self._before if _versions(owner) != was]
        self._before = []


class _AsBefore(AbstractContextManager[None]):
    """Puts copies of what was in the buffers in their place, and the buffers back in the end."""

    def __init__(self, inner: AbstractContextManager, watched: _Watched) -> None:
        self._inner, self._watched = inner, watched

    def __enter__(self) -> None:
        updated = self._watched.updated
        self._kept = [(owner, _buffers(owner)) for owner, _ in updated]
        for (owner, _), content in zip(updated, _copies([content for _, content in updated]), strict=True):
            owner._buffers.update(content)
        self._inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._inner.__exit__(*error)
        for owner, buffers in self._kept:
            owner._buffers.update(buffers)


def _buffers(owner: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in owner._buffers.items() if buffer is not None}


def _copies(many: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Copies of all tensors; of one that stands in several places, one."""
    made = {id(buffer): buffer.detach().clone() for buffers in many for buffer in buffers.values()}
    return [{name: made[id(buffer)] for name, buffer in buffers.items()} for buffers in many]


def _versions(owner: nn.Module) -> list[tuple[int, int]]:
    return [(id(buffer), version_of(buffer)) for buffer in _buffers(owner).values()]


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
