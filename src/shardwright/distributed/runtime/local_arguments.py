"""Tensor arguments that hold an entry per attention head (an ALiBi bias), cut to this rank's heads."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardwright.distributed.runtime.collectives import Group
from shardwright.distributed.runtime.forward import Around, Forward, original_class
from shardwright.errors import PlanError


@dataclass(frozen=True)
class ArgumentCut:
    """One argument that is cut.

    Attributes:
        argument: its name in the module's forward.
        dim: the dim that is cut.
        heads: the dim's entries come in groups of so many, one per head; of each group, a rank gets its share.
    """

    argument: str
    dim: int
    heads: int

    @classmethod
    def parse(cls, text: str) -> ArgumentCut:
        """``alibi:0:8`` cuts dim 0 of ``alibi`` by 8 heads; raises PlanError where that is not what it says."""
        argument, *numbers = text.split(":")
        if not argument.isidentifier() or len(numbers) != 2 or not all(number.isdigit() for number in numbers):
            raise PlanError(f"A local argument is written name:dim:heads, as in 'alibi:0:8', not {text!r}.")
        return cls(argument, int(numbers[0]), int(numbers[1]))

    def __str__(self) -> str:
        return f"{self.argument}:{self.dim}:{self.heads}"

    def take(self, x: Tensor, rank: int, size: int) -> Tensor:
        """What ``rank`` of ``size`` gets of the argument."""
        groups = x.unflatten(self.dim, (-1, self.heads))
        share = self.heads // size
        return groups.narrow(self.dim + 1, rank * share, share).flatten(self.dim, self.dim + 1)


class LocalArguments(Around):
    """Run a module with some of its arguments cut."""

    def __init__(self, module: nn.Module, cuts: tuple[ArgumentCut, ...], mesh: DeviceMesh) -> None:
        self.cuts = {cut.argument: cut for cut in cuts}
        self.names = list(inspect.signature(original_class(module).forward).parameters)[1:]
        self.group = Group.of(mesh)

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args = tuple(self._local(*pair) for pair in zip(self.names, args, strict=False)) + args[len(self.names) :]
        return forward(*args, **{name: self._local(name, value) for name, value in kwargs.items()})

    def _local(self, name: str, value: Any) -> Any:
        cut = self.cuts.get(name)
        return value if cut is None or value is None else cut.take(value, self.group.rank, self.group.size)
