"""What runs around the blocks of a context-parallel model, and around the parts of them that see whole sequences."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from shardwright._torch import without_torch_function
from shardwright.distributed.runtime.context import parts
from shardwright.distributed.runtime.context.base import Context, ContextTensor
from shardwright.distributed.runtime.context.parts import Split
from shardwright.distributed.runtime.context.places import (
    RESULT,
    Place,
    Places,
    argument_names,
    mapped,
    mapped_arguments,
)
from shardwright.distributed.runtime.context.sharded import (
    ContextSharded,
    context_sharded,
    handed_out,
    made_whole,
    recognized,
    taken_in,
)
from shardwright.distributed.runtime.forward import Around, Forward, original_class
from shardwright.distributed.runtime.gradients import with_others_in_graph
from shardwright.errors import PlanError


def used(result: Any, handed: list[Tensor]) -> Any:
    """``result`` with what the block was handed in its graph, whether or not the block used it.

    FSDP2 passes every argument of a unit through one autograd function, which makes a plain tensor of zeros in the
    place of a gradient that does not come. Added to a gradient that is a DTensor, that raises.
    """
    first = True

    def anchor(path: str, x: Tensor) -> Tensor:
        nonlocal first
        if not first or not x.requires_grad or isinstance(x, ContextTensor):
            return x
        first = False
        return with_others_in_graph(x, handed)

    return mapped(result, RESULT, anchor) if handed else result


class ContextBlock(Around):
    """A block whose code works on this rank's part of the sequence.

    Outside, what has an item for every position is a :class:`ContextSharded`, so that code between the blocks sees the
    true length. Inside it is a plain tensor.

    Args:
        stream: the name of the argument that the length is read from, ``[batch, positions, features]``.
        places: of the arguments (``stream`` among them) and results that are split.
    """

    eager = True

    def __init__(self, module: nn.Module, context: Context, stream: str, places: Places) -> None:
        self.context, self.stream = context, stream
        self.names = argument_names(module)
        self.arguments, self.results = dict(places.arguments), dict(places.results)

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = original_class(module).__name__
        stream = kwargs[self.stream] if self.stream in kwargs else args[self.names.index(self.stream)]
        split, batch = self._split(stream), stream.shape[max(self.arguments[self.stream].dim - 1, 0)]
        if split is None:
            return forward(*made_whole(args), **made_whole(kwargs))
        wholes: list[tuple[Tensor, Tensor]] = []
        handed: list[Tensor] = []

        def enter(path: str, x: Tensor) -> Tensor:
            place = self.arguments.get(path)
            x = recognized(x, self.context.meshes)
            if isinstance(x, ContextSharded):
                handed.append(x.to_local())
            if place is None:
                return made_whole(x)
            mine = _entered(x, place, split, batch, f"{name}'s argument {path}")
            if mine is not x and path != self.stream:
                wholes.append((mine, x))
            return mine

        def leave(path: str, x: Tensor) -> Tensor:
            place = self.results.get(path)
            if place is None or isinstance(x, ContextTensor):
                return x
            return context_sharded(x, place.split(split, batch), self.context.meshes)

        args, kwargs = mapped_arguments(self.names, args, kwargs, enter)
        with self.context.running(split, batch, wholes):
            result = forward(*args, **kwargs)
        return mapped(used(result, handed), RESULT, leave)

    def _split(self, stream: Tensor) -> Split | None:
        """How the sequence is dealt out; None where a rank would have nothing of it, or the whole is wanted."""
        if not self.context.active:
            return None
        found = recognized(stream, self.context.meshes)
        if isinstance(found, ContextSharded):
            return found.dealt
        dim = self.arguments[self.stream].dim
        split = Split.even(self.context.meshes.group, dim, stream.shape[dim])
        return split if all(end > start for start, end in split.bounds) else None


def _entered(x: Tensor, place: Place, split: Split, batch: int, what: str) -> Tensor:
    """This rank's part of an argument."""
    wanted = place.split(split, batch)
    if isinstance(x, ContextSharded) and x.dealt == wanted:
        return x.inside
    x = made_whole(x)
    if x.ndim > place.dim and x.shape[place.dim] == wanted.total:
        return parts.part(x, wanted)
    if x.ndim > place.dim and x.shape[place.dim] == 1:
        return x
    raise PlanError(
        f"{what} has the shape {tuple(x.shape)}; its dim {place.dim} should have an item for each of {wanted.total} "
        "positions, as it had when context parallelism was planned. Use this model with cp=1, or give it that shape."
    )


class ContextRegion(Around):
    """A part of a block that sees the whole sequence: its input is gathered, and its result split again.

    Args:
        places: of the arguments that come in parts, and of the results that have an item for every position.
    """

    eager = True

    def __init__(self, module: nn.Module, context: Context, places: Places) -> None:
        self.context = context
        self.names = argument_names(module)
        self.arguments, self.results = dict(places.arguments), dict(places.results)

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        split, batch = self.context.split, self.context.batch
        if split is None:
            return forward(*args, **kwargs)

        def gather(path: str, x: Tensor) -> Tensor:
            place = self.arguments.get(path)
            if place is None or isinstance(x, ContextTensor):
                return made_whole(x)
            known = self.context.whole_of(x)
            return parts.whole(x, place.split(split, batch)) if known is None else known

        def cut(path: str, x: Tensor) -> Tensor:
            place = self.results.get(path)
            return x if place is None else parts.part(x, place.split(split, batch))

        args, kwargs = mapped_arguments(self.names, args, kwargs, gather)
        with self.context.running(None, 0, []):
            result = forward(*args, **kwargs)
        return mapped(result, RESULT, cut)


class WholeContextBlock(Around):
    """A block that runs on the whole sequence, alike on every rank."""

    eager = True

    def __init__(self, context: Context) -> None:
        self.context = context

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        handed: list[Tensor] = []

        def whole(path: str, x: Tensor) -> Tensor:
            x = recognized(x, self.context.meshes)
            if isinstance(x, ContextSharded):
                handed.append(x.to_local())
            return made_whole(x)

        args, kwargs = mapped_arguments([], args, kwargs, whole)
        return used(forward(*args, **kwargs), handed)


class ContextLayer(Around):
    """A linear layer or a norm outside of the blocks: each rank computes its part."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = recognized(args[0], self.context.meshes) if args and isinstance(args[0], Tensor) else None
        if not isinstance(x, ContextSharded) or x.dealt.dim == x.ndim - 1 or len(args) > 1 or kwargs:
            return forward(*args, **kwargs)
        within = x if x.dealt.inside else taken_in(x, self.context.meshes)  # called by code around the model
        with without_torch_function():
            inside = within.inside
        result = context_sharded(forward(inside), within.dealt, self.context.meshes)
        return result if x.dealt.inside else handed_out(result)
