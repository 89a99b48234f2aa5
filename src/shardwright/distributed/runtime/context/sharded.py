"""The class of tensors that model code and loss code see in the place of whole ones."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from shardwright._torch import without_torch_function
from shardwright.distributed.runtime.context import parts
from shardwright.distributed.runtime.context.base import ContextTensor, Meshes, make, recovered
from shardwright.distributed.runtime.context.losses import LOSSES
from shardwright.distributed.runtime.context.parts import Split
from shardwright.distributed.runtime.context.rules import RULES
from shardwright.distributed.runtime.implicit import refuse_address, tensors_in
from shardwright.distributed.runtime.operations import ABOUT_THE_TENSOR, DRAWS, writes
from shardwright.distributed.runtime.random_states import drawing_alike
from shardwright.errors import ConfigError


class ContextSharded(ContextTensor):
    """A tensor that is split along the sequence.

    Code that does not know mixes it with plain tensors, which are whole. What has no rule (:mod:`.rules`) is computed
    on whole tensors, alike on every rank, and is plain afterwards.
    """

    __slots__ = ()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        refuse_address(func, args)
        name = func.__name__
        if name in ABOUT_THE_TENSOR:
            with without_torch_function():
                return func(*args, **kwargs)
        if (loss := LOSSES.get(func)) is not None:
            result = loss(*args, **kwargs)
        elif (rule := RULES.get(name)) is not None:
            result = rule(func, args, kwargs)
        else:
            result = NotImplemented
        return _on_whole(func, args, kwargs) if result is NotImplemented else result


def _on_whole(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    first = next(x for x in tensors_in((args, kwargs)) if isinstance(x, ContextTensor))
    with ExitStack() as stack:
        if func.__name__ in DRAWS:
            stack.enter_context(drawing_alike(first.meshes.cp))
            if first.meshes.both is not None:
                stack.enter_context(drawing_alike(first.meshes.tp))
        if not (writes(func) or func is Tensor.__setitem__) or not isinstance(args[0], ContextTensor):
            return func(*made_whole(args), **made_whole(kwargs))
        x, *others = args
        new = x.whole().clone()
        func(new, *made_whole(others), **made_whole(kwargs))
    with without_torch_function():
        x.copy_(_part_like(x, new))
    return None if func is Tensor.__setitem__ else x


def _part_like(x: ContextTensor, new: Tensor) -> ContextTensor:
    """What this rank has of ``new``, which is whole, laid out as ``x`` is."""
    mine = parts.part(new, x.dealt)
    if x.kind is None:
        return x.like(mine, x.dealt)
    replicated = DTensor.from_local(mine, x.meshes.tp, [Replicate()], run_check=False)
    inside = replicated.redistribute(placements=[x.placements[1]])
    inside.__class__ = x.kind
    return x.like(inside, x.dealt)


def made_whole(value: Any) -> Any:
    """``value`` with every tensor in it that is split along the sequence made whole: a collective for each."""
    if isinstance(value, ContextTensor):
        return value.whole()
    if isinstance(value, dict):
        return {key: made_whole(item) for key, item in value.items()}
    return type(value)(made_whole(item) for item in value) if type(value) in (tuple, list) else value


def context_sharded(inside: Tensor, split: Split, meshes: Meshes) -> ContextSharded:
    """``inside``, this rank's part, as a tensor that knows the whole length."""
    return make(ContextSharded, inside, split, meshes)


def recognized(x: Tensor, meshes: Meshes) -> Tensor:
    """``x``, as a :class:`ContextSharded` where it is one that something took the class off."""
    if isinstance(x, DTensor) and x.device_mesh in (meshes.cp, meshes.both):
        return recovered(ContextSharded, x, meshes)
    return x


def taken_in(x: ContextSharded, meshes: Meshes) -> ContextSharded:
    """``x``, which is of the code around a model, for its inside.

    Raises:
        ConfigError: it was split over other ranks than the model.
    """
    if x.dealt.group != meshes.group:
        raise ConfigError(
            f"The batch was split over {x.dealt.group.size} ranks of another mesh than the model, which has "
            f"cp={meshes.group.size}. Call shard_batch with the mesh that the model was parallelized on."
        )
    return _moved(x, meshes, parts.arriving, inside=True)


def handed_out(x: ContextSharded) -> ContextSharded:
    """``x``, which is of the inside of a model, for the code around it."""
    return _moved(x, x.meshes, parts.leaving, inside=False) if x.dealt.inside else x


def _moved(
    x: ContextSharded, meshes: Meshes, rescaled: Callable[[Tensor, Split], Tensor], *, inside: bool
) -> ContextSharded:
    """``x`` on the other side of a model's border, where gradients have another scale."""
    split = replace(x.dealt, inside=inside)
    with without_torch_function():
        part = x.inside
        if not isinstance(part, DTensor):
            return context_sharded(rescaled(part, split), split, meshes)
        local = rescaled(part.to_local(), split)
        made: Any = DTensor.from_local(
            local, part.device_mesh, part.placements, run_check=False, shape=part.shape, stride=part.stride()
        )
        made.__class__ = type(part)
        return context_sharded(made, split, meshes)
