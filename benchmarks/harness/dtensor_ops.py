"""Counts the operations that go through DTensor's dispatcher. Runs in the contenders' interpreters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Self

from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode


class DTensorOperations(TorchDispatchMode):
    """Operations with a DTensor among their arguments, by name.

    Attributes:
        everywhere: all of them, forward and backward.
        inside: those of the forward of one of ``blocks``. Taking a view of a DTensor's local part is not an operation
            on DTensors and is not counted.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.everywhere: Counter[str] = Counter()
        self.inside: Counter[str] = Counter()
        self._blocks, self._depth, self._hooks = blocks, 0, list[Any]()

    def __enter__(self) -> Self:
        for block in self._blocks:
            self._hooks.append(block.register_forward_pre_hook(self._enter_block))
            self._hooks.append(block.register_forward_hook(self._leave_block))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            name = func._schema.name.removeprefix("aten::")
            self.everywhere[name] += 1
            if self._depth:
                self.inside[name] += 1
            return NotImplemented
        return func(*args, **(kwargs or {}))

    def _enter_block(self, *_: Any) -> None:
        self._depth += 1

    def _leave_block(self, *_: Any) -> None:
        self._depth -= 1
