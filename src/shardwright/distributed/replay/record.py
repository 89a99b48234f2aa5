"""What the stubs of a weightless copy answer, and what is learned from running it.

The *full run* runs the model in one process: every stub hands out random outputs, and random gradients in backward,
and all that passes through is written down. A *rank run* replays one rank of the sharded model against that record:
every stub is given what the full run saw (this rank's slice of it, where the layer is cut) and checks that the code
between the stubs brought it what the full run brought, in forward and in backward. If every rank passes, the sharded
model is the same function, whatever the weights: the matrices themselves are cut exactly, and all else was compared.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardwright.distributed.styles.cuts import WHOLE, Cut

# Slicing changes the order of float32 sums at most, which is about 1e-6. A region that is nearly right (a norm over a
# slice in place of all features) must not pass, so this is strict; what it rejects by mistake is gathered, and exact.
TOLERANCE = 3e-5


# What a model's code may raise when its tensors have sizes it does not expect.
CODE_ERRORS = (
    RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError, ArithmeticError,
    NotImplementedError, UnboundLocalError,
)  # fmt: skip


class Mismatch(Exception):
    """A rank's tensor is not what the full run says it should be. Names the stub (or ``output``)."""


@dataclass
class Call:
    """One call of a stub in the full run.

    Attributes:
        name: copied name of the module.
        index: 0 for its first call, 1 for the next, ...
        input: what it was given (for a table, nothing is kept).
        output: what it gave.
        input_grad: what its backward returns.
        output_grad: what its backward was given; None where nothing used the output.
        partial: in a dependency run, the gradient of ``output``.
    """

    name: str
    index: int
    output: Tensor
    input: Tensor | None = None
    input_grad: Tensor | None = None
    output_grad: Tensor | None = None
    partial: Tensor | None = None

    @property
    def key(self) -> tuple[str, int]:
        return self.name, self.index


class Recorder:
    """Answers the stubs. ``width`` is the number of output features."""

    def linear(self, name: str, x: Tensor, width: int) -> Tensor:
        raise NotImplementedError

    def table(self, name: str, ids: Tensor, width: int) -> Tensor:
        raise NotImplementedError

    def opaque(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        raise NotImplementedError


class Idle(Recorder):
    """No run is going on."""


class _FullStub(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, call: Call, recorder: FullRun) -> Tensor:
        ctx.call, ctx.recorder = call, weakref.ref(recorder)
        ctx.set_materialize_grads(False)
        return call.output.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if ctx.recorder().tracing:
            ctx.call.partial = _plus(ctx.call.partial, grad)
            return None, None, None, None
        ctx.call.output_grad = _plus(ctx.call.output_grad, grad)
        return ctx.call.input_grad, None, None, None


class FullRun(Recorder):
    """The record of a run in one process, with values drawn from ``seed``.

    Attributes:
        calls: by name and index.
        sources: the inputs of the calls that have one, with their graph. Not in the calls, and the graph's nodes know
            their recorder weakly: a graph that led to itself would never be freed.
    """

    def __init__(self, seed: int) -> None:
        self.calls: dict[tuple[str, int], Call] = {}
        self.sources: dict[tuple[str, int], Tensor] = {}
        self.tracing = False
        self._count: dict[str, int] = defaultdict(int)
        self._generator = torch.Generator().manual_seed(seed + 1)
        self._anchor = torch.zeros((), requires_grad=True)

    @staticmethod
    def call_of(node: Any) -> Call | None:
        """The call that a node of the autograd graph stands for, if it is a stub's."""
        # Not its name(), which torch 2.11 does not have for functions written in Python.
        return node.call if type(node).__name__ == "_FullStubBackward" else None

    def linear(self, name: str, x: Tensor, width: int) -> Tensor:
        return self._answer(name, x, (*x.shape[:-1], width))

    def table(self, name: str, ids: Tensor, width: int) -> Tensor:
        return self._answer(name, None, (*ids.shape, width))

    def opaque(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        x = first_float(args, kwargs)
        return self._answer(name, x, tuple(x.shape))

    def _answer(self, name: str, x: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        call = Call(name, self._count[name], self._random(shape))
        self._count[name] += 1
        self.calls[call.key] = call
        if x is not None:
            self.sources[call.key] = x
            call.input, call.input_grad = x.detach().clone(), self._random(x.shape)
        return _FullStub.apply(self._anchor if x is None else x, self._anchor, call, self)

    def _random(self, shape: tuple[int, ...] | torch.Size) -> Tensor:
        return torch.randn(shape, generator=self._generator)


class _RankStub(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, call: Call, recorder: RankRun) -> Tensor:
        ctx.call, ctx.recorder = call, weakref.ref(recorder)
        return recorder.cut_out(call, call.output).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        recorder = ctx.recorder()
        recorder.grads[ctx.call.key] = _plus(recorder.grads.get(ctx.call.key), grad)
        input_grad = ctx.call.input_grad
        return None if input_grad is None else recorder.cut_in(ctx.call, input_grad), None, None, None


class RankRun(Recorder):
    """Rank ``rank`` of ``size``, replayed against ``record``.

    Args:
        cuts_in: stub name -> how its input is cut; whole where there is none.
        cuts_out: stub name -> how its output is cut.

    Attributes:
        stand_ins: what code was handed in the place of a tensor, and the tensor, which a stub reads.
    """

    def __init__(
        self, record: FullRun, rank: int, size: int, cuts_in: Mapping[str, Cut], cuts_out: Mapping[str, Cut]
    ) -> None:
        self.record, self.rank, self.size = record, rank, size
        self.cuts_in, self.cuts_out = cuts_in, cuts_out
        self.grads: dict[tuple[str, int], Tensor] = {}
        self.stand_ins: list[tuple[Tensor, Tensor]] = []
        self._count: dict[str, int] = defaultdict(int)
        self._anchor = torch.zeros((), requires_grad=True)

    def cut_in(self, call: Call, x: Tensor) -> Tensor:
        return self.cuts_in.get(call.name, WHOLE).take(x, -1, self.rank, self.size)

    def cut_out(self, call: Call, x: Tensor) -> Tensor:
        return self.cuts_out.get(call.name, WHOLE).take(x, -1, self.rank, self.size)

    def linear(self, name: str, x: Tensor, width: int) -> Tensor:
        return self._answer(name, x)

    def table(self, name: str, ids: Tensor, width: int) -> Tensor:
        return self._answer(name, None)

    def opaque(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        return self._answer(name, first_float(args, kwargs))

    def _answer(self, name: str, x: Tensor | None) -> Tensor:
        call = self.record.calls.get((name, self._count[name]))
        self._count[name] += 1
        if call is None:
            raise Mismatch(name)
        if x is not None:
            assert call.input is not None
            x = next((whole for seen, whole in reversed(self.stand_ins) if seen is x), x)
            if not same(x, self.cut_in(call, call.input)):
                raise Mismatch(name)
        return _RankStub.apply(self._anchor if x is None else x, self._anchor, call, self)


def first_float(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The first floating-point tensor among the arguments."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise Mismatch("a module without a floating-point input")


def same(x: Tensor, expected: Tensor) -> bool:
    """Equal up to float32 rounding, and finite (where all is NaN, nothing is shown)."""
    if x.shape != expected.shape:
        return False
    difference = (x.detach().float() - expected.float()).abs().max() if x.numel() else torch.zeros(())
    scale = expected.float().abs().max() if x.numel() else torch.zeros(())
    return bool(difference <= TOLERANCE * scale + 1e-30)


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
