"""An argument whose width a module's code reads, seen with this rank's width.

Much attention code takes the width from its input: ``b, t, c = x.shape``, then ``view(b, t, heads, c // heads)``. On a
rank ``c`` has to be that rank's share, while the layers that read ``x`` need all of it. So the code gets a *stand-in*
of the right shape, and a column-parallel layer that is handed the stand-in reads ``x``. The stand-in is made of NaN and
takes no memory: code that uses more of it than its shape is not silently wrong.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.distributed.runtime.forward import Around, Forward, original_class
from shardwright.distributed.runtime.regions import SharedInput
from shardwright.errors import PlanError

WIDTH = "width"  # as in "x:width", in a plan's local arguments


def stand_in(x: Tensor, size: int) -> Tensor:
    """What code sees of ``x`` [..., width] on one of ``size`` ranks: [..., width / size], every entry NaN.

    Raises:
        PlanError: ``size`` does not divide the width.
    """
    if x.shape[-1] % size:
        raise PlanError(f"An argument of width {x.shape[-1]} is made rank-local, but tp={size} does not divide it.")
    nothing = torch.full((), torch.nan, dtype=x.dtype, device=x.device, requires_grad=x.requires_grad)
    return nothing.expand(*x.shape[:-1], x.shape[-1] // size)


def arguments_of(module: nn.Module) -> list[str]:
    """The names of the arguments of a module's own forward."""
    return list(inspect.signature(original_class(module).forward).parameters)[1:]


class LocalWidth(Around):
    """Run a module with a stand-in of one argument, which the region's readers know the whole of.

    Args:
        argument: its name in the module's forward.
        shared: of the region that the module is.
        size: number of ranks.
    """

    def __init__(self, module: nn.Module, argument: str, shared: SharedInput, size: int) -> None:
        self.argument = argument
        self.position = arguments_of(module).index(argument)
        self.shared = shared
        self.size = size

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.position < len(args):
            args = (*args[: self.position], self._seen(args[self.position]), *args[self.position + 1 :])
        elif self.argument in kwargs:
            kwargs = {**kwargs, self.argument: self._seen(kwargs[self.argument])}
        return forward(*args, **kwargs)

    def _seen(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        seen = stand_in(x, self.size)
        self.shared.see(seen, x)
        return seen
