"""What every module was called with in a full run."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from shardwright._torch import tree_leaves
from shardwright.distributed.models.blocks import block_names


@dataclass
class ModuleCall:
    """One call: its arguments and its result, as they were then.

    Attributes:
        left: by argument, what the call left in dicts by which modules hand each other tensors.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    left: dict[str, UserDict[Any, Any]] = field(default_factory=dict)


@dataclass
class ModuleCalls:
    """The calls of a run. All names are copied names.

    Attributes:
        of_blocks: blocks, and the modules directly below them -> their calls.
        inputs: module -> the places in the autograd graph that its positional arguments come from.
        outputs: module -> the places that its results come from.
        counts: module -> how often it was called.
    """

    of_blocks: dict[str, list[ModuleCall]] = field(default_factory=dict)
    inputs: dict[str, list[Any]] = field(default_factory=dict)
    outputs: dict[str, list[Any]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def note(self, name: str, args: tuple[Any, ...], output: Any) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1
        self.inputs.setdefault(name, []).extend(_nodes(args))
        self.outputs.setdefault(name, []).extend(_nodes(tree_leaves(output)))


@contextmanager
def recorded_calls(model: nn.Module) -> Iterator[ModuleCalls]:
    """Record the calls of all modules of ``model`` inside."""
    calls = ModuleCalls()
    blocks = block_names(model)
    kept = {name for block in blocks for name in (block, *_children(model, block))}
    hooks = []
    for name, module in model.named_modules():

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            calls.note(name, args, output)
            if name in kept:
                call = ModuleCall(as_now(args), as_now(kwargs), as_now(output))
                calls.of_blocks.setdefault(name, []).append(call)

        hooks.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in hooks:
            handle.remove()


def _children(model: nn.Module, block: str) -> list[str]:
    return [f"{block}.{child}" for child, _ in model.get_submodule(block).named_children()]


def _nodes(values: Any) -> list[Any]:
    return [x.grad_fn for x in values if isinstance(x, Tensor) and x.grad_fn is not None]


def as_now(value: Any) -> Any:
    """The values as they are now; a later operation in place does not reach them."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {key: as_now(item) for key, item in value.items()}
    return tuple(as_now(item) for item in value) if type(value) in (tuple, list) else value
