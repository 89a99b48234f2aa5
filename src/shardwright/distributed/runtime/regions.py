"""Regions: the stretch between the layers that read the residual stream and the layer that writes back into it.

A *region* is a module such as an attention or an MLP whose children hold column-parallel readers and a row-parallel
writer. Without sequence parallelism all that is needed there is that readers of one input share one backward
reduction (:class:`SharedInput`). With it, the residual stream outside is split along the sequence:

- a :class:`SequenceBlock` (one transformer layer) takes and returns the stream as a DTensor sharded along the
  sequence, so that code between the blocks sees its true length, and works on the local chunk inside;
- a :class:`SequenceRegion` gathers its input and leaves the result split again. In a *direct* region everything between
  the readers and its one writer is rank-local work, so the gather's backward and the writer's forward are
  reduce-scatters. In any other region some work is done alike on every rank; there the readers reduce for themselves,
  the writers all-reduce, and the region's result is cut.

Sequence parallelism: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models".
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shardwright.distributed.runtime import collectives as c
from shardwright.distributed.runtime.forward import Around, Forward, original_class
from shardwright.distributed.runtime.implicit import ImplicitDTensor, joined, mark
from shardwright.distributed.runtime.layout import sharded
from shardwright.errors import PlanError

SEQUENCE_DIM = 1  # [batch, sequence, features]


class SharedInput:
    """One input that several column-parallel layers read, so that its gradient is summed over the ranks once.

    Works by identity: readers that are handed the same tensor share the copy that was made for the first. So do readers
    that are handed it by way of module backward hooks, which give every module a view of its own. Only inside the
    region's forward, so that no activation outlives it.
    """

    def __init__(self) -> None:
        self.active = False
        self.direct = False
        self.written = False
        self._source: Tensor | None = None
        self._copy: Tensor | None = None
        self._seen: tuple[Tensor, Tensor] | None = None

    def see(self, stand_in: Tensor, x: Tensor) -> None:
        """Note that the region's code is handed ``stand_in`` where its readers are to read ``x``."""
        self._seen = stand_in, x

    def behind(self, x: Tensor) -> Tensor:
        """The tensor that ``x`` stands for: itself, unless it is the stand-in."""
        if self._seen is None:
            return x
        stand_in, whole = self._seen
        if x is stand_in:
            return whole
        return c.join(whole, x) if _only_hooked(x, stand_in) else x

    def copy(self, x: Tensor, group: c.Group) -> Tensor:
        """``x``, which is whole, for rank-local work."""
        if self.active and self.direct:
            if self.written:
                raise PlanError(
                    "A column-parallel layer runs after the row-parallel layer of the same region, which sequence "
                    "parallelism cannot tell from a reader of the region's input. Put the two into modules of their "
                    "own, or use this plan without sequence parallelism."
                )
            return x
        return self._once(x, lambda: c.copy_to_region(x, group))

    def gathered(self, x: Tensor, gather: Callable[[], Tensor]) -> Tensor:
        """``x``, which is this rank's chunk of the sequence, as ``gather`` makes it whole for rank-local work."""
        return self._once(x, gather)

    def _once(self, x: Tensor, make: Callable[[], Tensor]) -> Tensor:
        if not self.active:
            return make()
        if self._source is x and self._copy is not None:
            return self._copy
        if self._source is not None and self._copy is not None and _only_hooked(x, self._source):
            return c.join(self._copy, x)
        self._source, self._copy = x, make()
        return self._copy

    def open(self, *, direct: bool) -> None:
        self.active, self.direct, self.written = True, direct, False

    def close(self) -> None:
        self.active = False
        self._source = self._copy = self._seen = None


def _only_hooked(x: Tensor, source: Tensor) -> bool:
    """Whether two tensors are one, but for what torch puts between a tensor and a module with backward hooks."""
    return x.requires_grad and source.requires_grad and _before_hooks(x) == _before_hooks(source)


def _before_hooks(x: Tensor) -> tuple[Node | None, int]:
    """The place in the autograd graph that ``x`` comes from, module hooks left out: a node, the number of its output.

    ``register_full_backward_hook`` and its like pass a module's inputs through a node of this name, which has one input
    for each output (torch 2.11 to 2.13, ``torch/nn/modules/_functions.py``).
    """
    edge = get_gradient_edge(x)
    node: Node | None = edge.node
    output = edge.output_nr
    while node is not None and node.name() == "BackwardHookFunctionBackward":
        node, output = node.next_functions[output]
    return node, output


class Region(Around):
    """A region whose input is whole."""

    def __init__(self, shared: SharedInput) -> None:
        self.shared = shared

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.shared.open(direct=False)
        try:
            return forward(*args, **kwargs)
        finally:
            self.shared.close()


class SequenceLength:
    """Batch size and full sequence length of the block that is running; its block sets it, its regions read it."""

    def __init__(self) -> None:
        self.batch = 0
        self.value = 0

    def gather(self, x: Tensor, group: c.Group, *, partial_grad: bool) -> Tensor:
        """The whole of a chunk ``[batch, chunk, features]`` or ``[batch * chunk, features]``, in the same form."""
        if x.ndim > 2:
            return c.gather(x, SEQUENCE_DIM, self.value, group, partial_grad=partial_grad)
        start, end = group.bounds(self.value)
        chunk = x.unflatten(0, (self.batch, end - start))
        return c.gather(chunk, SEQUENCE_DIM, self.value, group, partial_grad=partial_grad).flatten(0, 1)

    def split(self, x: Tensor, group: c.Group, *, partial: bool) -> Tensor:
        """This rank's chunk of a whole (or, where ``partial``, of a sum's parts), in the form that it came in.

        Raises:
            PlanError: neither ``[batch, sequence, features]`` nor ``[batch * sequence, features]``.
        """
        change = c.reduce_scatter_from_region if partial else c.scatter
        if x.ndim == 2 and x.shape[0] == self.batch * self.value:
            return change(x.unflatten(0, (self.batch, self.value)), SEQUENCE_DIM, group).flatten(0, 1)
        if x.ndim < 3 or x.shape[SEQUENCE_DIM] != self.value:
            raise PlanError(
                f"Sequence parallelism expects [batch, sequence, features] with a sequence of {self.value} where the "
                f"residual stream is written, got shape {tuple(x.shape)}. Use this model without sequence parallelism."
            )
        return change(x, SEQUENCE_DIM, group)


class SequenceRegion(Around):
    """A region whose input and output are this rank's chunk of the sequence."""

    def __init__(
        self, module: nn.Module, shared: SharedInput, length: SequenceLength, mesh: DeviceMesh, *, direct: bool
    ) -> None:
        self.shared = shared
        self.length = length
        self.group = c.Group.of(mesh)
        self.direct = direct
        self.first = first_argument(module)

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def whole(x: Tensor) -> Tensor:
            return self.length.gather(x, self.group, partial_grad=self.direct)

        def cut(x: Tensor) -> Tensor:
            return self.length.split(x, self.group, partial=False)

        if self.direct:
            # All work in here is rank-local, so whatever else comes in (another model's states) gets partial gradients.
            args = (*args[:1], *(_for_local_work(x, self.group) for x in args[1:]))
            others = {name: _for_local_work(x, self.group) for name, x in kwargs.items() if args or name != self.first}
            kwargs = {**kwargs, **others}
        args, kwargs = on_first_tensor(whole, self.first, args, kwargs)
        self.shared.open(direct=self.direct)
        try:
            result = forward(*args, **kwargs)
        finally:
            self.shared.close()
        return result if self.direct else on_result(cut, result)


class SequenceBlock(Around):
    """One transformer layer between whose ends the residual stream is split along the sequence."""

    eager = True  # the stream outside is a DTensor of a class that torch.compile does not know

    def __init__(self, module: nn.Module, length: SequenceLength, mesh: DeviceMesh) -> None:
        self.length = length
        self.mesh = mesh
        self.group = c.Group.of(mesh)
        self.first = first_argument(module)

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = on_first_tensor(self._enter, self.first, args, kwargs)
        result = forward(*args, **kwargs)
        length = self.length.value

        def leave(x: Tensor) -> Tensor:
            return sequence_sharded(x, length, self.mesh)

        return on_result(leave, result)

    def _enter(self, x: Tensor) -> Tensor:
        self.length.batch, self.length.value = x.shape[0], x.shape[SEQUENCE_DIM]
        return x.to_local() if isinstance(x, DTensor) else c.scatter(x, SEQUENCE_DIM, self.group)


def _for_local_work(value: Any, group: c.Group) -> Any:
    if isinstance(value, Tensor):
        plain = value.requires_grad and not isinstance(value, DTensor)
        return c.copy_to_region(value, group) if plain else value
    if type(value) in (tuple, list):
        return type(value)(_for_local_work(item, group) for item in value)
    return value


class WholeBlock(Around):
    """A block that needs the whole sequence, behind one that leaves the stream split."""

    eager = True

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return forward(*(_joined(x) for x in args), **{name: _joined(x) for name, x in kwargs.items()})


def _joined(x: Any) -> Any:
    return joined(x) if isinstance(x, SequenceSharded) else x


class SequenceSharded(ImplicitDTensor):
    """The residual stream between the blocks, split along the sequence.

    It becomes whole where code picks positions by a mask, clones it in order to write into the clone, or lays the batch
    and the sequence out as one dim, in which the chunks are no longer in one piece.
    """

    __slots__ = ()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.clone, Tensor.clone) or (func is Tensor.__getitem__ and _has_tensor(args[1])):
            return func(*(_joined(x) for x in args), **(kwargs or {}))
        if func.__name__ in RESHAPES and _merges(func, args, kwargs or {}):
            return func(*(_joined(x) for x in args), **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


RESHAPES = frozenset({"view", "reshape", "flatten", "view_as"})


def _merges(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the dims up to the sequence are no longer what they were."""
    x, *others = args
    if not isinstance(x, SequenceSharded) or any(isinstance(item, torch.dtype) for item in others):
        return False
    like = [torch.empty(item.shape, device="meta") if isinstance(item, Tensor) else item for item in others]
    shape = func(torch.empty(x.shape, device="meta"), *like, **kwargs).shape
    return shape[: SEQUENCE_DIM + 1] != x.shape[: SEQUENCE_DIM + 1]


def _has_tensor(index: Any) -> bool:
    return any(isinstance(item, Tensor) for item in (index if isinstance(index, tuple) else (index,)))


def sequence_sharded(local: Tensor, length: int, mesh: DeviceMesh) -> SequenceSharded:
    """This rank's chunk as a DTensor that knows the whole length."""
    return mark(sharded(local, SEQUENCE_DIM, length, mesh), SequenceSharded)


def first_argument(module: nn.Module) -> str:
    """The name of the first argument of the module's forward: the residual stream, or what was read from it."""
    parameters = list(inspect.signature(original_class(module).forward).parameters)
    return parameters[1] if len(parameters) > 1 else ""


def on_first_tensor(
    change: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Apply ``change`` to the first argument, wherever the caller put it."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    if name not in kwargs:
        raise PlanError(f"Expected the residual stream as the first argument or as {name!r}; got {sorted(kwargs)}.")
    return args, {**kwargs, name: change(kwargs[name])}


def on_result(change: Any, result: Any) -> Any:
    """Apply ``change`` to a tensor, or to the first item of a tuple or list."""
    if isinstance(result, Tensor):
        return change(result)
    if isinstance(result, (tuple, list)) and result and isinstance(result[0], Tensor):
        return type(result)((change(result[0]), *result[1:]))
    raise PlanError(f"Expected a tensor, or a tuple that begins with one; got {type(result).__name__}.")
