"""Which modules of the blocks are used while they do not run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from shardwright.distributed.models.blocks import block_names, owns_parameters
from shardwright.distributed.replay.watch import computed_with
from shardwright.distributed.replay.weightless import WeightlessCopy

Path = tuple[tuple[str, nn.Module], ...]  # from a block down to a module in it, by copied names
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # never called


class IdleUse(TorchFunctionMode):
    """Notes which modules of the blocks are used while they do not run.

    Attributes:
        outside: kinds of modules of which a parameter was used at such a time.
        without_gradient: kinds of modules that ran with gradients switched off: their backward is somebody else's.
    """

    def __init__(self, weightless: WeightlessCopy) -> None:
        super().__init__()
        self.weightless = weightless
        self.outside: set[str] = set()
        self.without_gradient: set[str] = set()
        self._running: Counter[int] = Counter()
        self._paths: dict[int, list[Path]] = {}  # of a module, or of a parameter: its owner's
        for block in block_names(weightless.model):
            self._add(block, weightless.model.get_submodule(block), ())
        named = weightless.model.named_modules(remove_duplicate=False)
        self._watched = {id(module): module for _, module in named if id(module) in self._paths}
        self._hooks: list[Any] = []

    def __enter__(self) -> IdleUse:
        for module in self._watched.values():
            self._hooks.append(module.register_forward_pre_hook(self._enter))
            self._hooks.append(module.register_forward_hook(self._leave, always_call=True))
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, where)
        for handle in self._hooks:
            handle.remove()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for param in computed_with(result, args, kwargs):
            self._use(param)
        return result

    def _add(self, name: str, module: nn.Module, above: Path) -> None:
        path = above if isinstance(module, _CONTAINERS) else (*above, (name, module))
        for part in (module, *module._parameters.values()):
            if part is not None:
                self._paths.setdefault(id(part), []).append(path)
        for child, part in module.named_children():
            self._add(f"{name}.{child}", part, path)

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._running[id(module)] += 1
        if owns_parameters(module):
            self._use(module)
        if not torch.is_grad_enabled():
            self.without_gradient |= {self._kind(path[-1][0]) for path in self._paths[id(module)] if path}

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running[id(module)] -= 1

    def _use(self, part: nn.Module | nn.Parameter) -> None:
        """Of a part that has several places, one must be running."""
        idle = [
            [name for name, module in path if not self._running[id(module)]] for path in self._paths.get(id(part), ())
        ]
        if all(idle):
            self.outside |= {self._kind(name) for names in idle for name in names}

    def _kind(self, name: str) -> str:
        return self.weightless.repeats.kind_of(self.weightless.repeats.original_name(name))
