"""Which modules can be gathered, recomputed or compiled by themselves: found by running a copy without weights.

Whatever wraps a module (FSDP2's gather, a checkpoint, a compiled graph) acts around the module's own forward. A block
whose children are called by its parent, whose weights other code reads, or whose backward is written by hand (a
reversible network) would be used while it is not gathered. The largest modules in it that are only used while they run
take its place, and what is in none of them belongs to the root.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from shardwright.distributed.models.blocks import block_names, is_block, numbers_to_globs, owns_parameters
from shardwright.distributed.replay.inputs import candidate_inputs
from shardwright.distributed.replay.record import CODE_ERRORS, Mismatch
from shardwright.distributed.replay.runs import forward_run
from shardwright.distributed.replay.watch import computed_with
from shardwright.distributed.replay.weightless import WeightlessCopy, weightless_copy

logger = logging.getLogger(__name__)

Path = tuple[tuple[str, nn.Module], ...]  # from a block down to a module in it, by copied names
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # never called


def unit_names(model: nn.Module) -> list[str]:
    """The names of the modules to gather, recompute or compile one by one, in the model's order.

    These are the repeated blocks, but for those that are used while they do not run. All blocks, where ``model`` cannot
    be run without its weights: its inputs cannot be guessed, or its parameters are DTensors already.
    """
    blocks = block_names(model)
    if not blocks or any(isinstance(param, DTensor) for param in model.parameters()):
        return blocks
    watch = _watched_run(model)
    if watch is None:
        return blocks
    units = [unit for block in blocks for unit in _usable(model, block, watch)]
    replaced = dict.fromkeys(numbers_to_globs(block) for block in blocks if block not in units)
    if replaced and (not dist.is_initialized() or dist.get_rank() == 0):
        taken = dict.fromkeys(numbers_to_globs(unit) for unit in units if unit not in blocks)
        logger.warning(
            "%s uses %s while they do not run, so they cannot be units of FSDP2 or of activation checkpointing: %s.",
            type(model).__name__,
            ", ".join(replaced),
            f"{', '.join(taken)} are, and the rest is the root's" if taken else "all of them is the root's",
        )
    return units


def _usable(model: nn.Module, name: str, watch: _Watch) -> Iterator[str]:
    """``name``, or the largest modules below it that are only used while they run."""
    module = model.get_submodule(name)
    if not isinstance(module, _CONTAINERS):
        kind = watch.weightless.repeats.kind_of(name)
        trained = any(param.requires_grad for param in module.parameters())
        if kind not in watch.outside and not (trained and kind in watch.without_gradient):
            yield name
            return
    for child, part in module.named_children():
        if is_block(part):
            yield from _usable(model, f"{name}.{child}", watch)


def _watched_run(model: nn.Module) -> _Watch | None:
    for inputs in candidate_inputs(model):
        watch = _Watch(weightless_copy(model))
        try:
            with watch:
                forward_run(watch.weightless, inputs)
        except (Mismatch, *CODE_ERRORS):
            continue
        return watch
    return None


class _Watch(TorchFunctionMode):
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
        for module in {id(module): module for _, module in named if id(module) in self._paths}.values():
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave, always_call=True)

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
