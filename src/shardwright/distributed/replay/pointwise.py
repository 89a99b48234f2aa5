"""A run in which every layer without its weights computes a known function of each position.

The full run of :mod:`.record` hands out random outputs, which is right for asking how features can be cut. Whether
code mixes *positions* is another question: a router that picks experts by what it is given, or code that flattens the
batch, must see the same values for the same position however many positions there are. So here a linear layer picks
features of its input and scales them, and a table answers with a function of the id.
"""

from __future__ import annotations

import zlib
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from shardwright.distributed.replay.module_calls import ModuleCall, as_now
from shardwright.distributed.replay.record import CODE_ERRORS, Idle, Recorder, first_float, same
from shardwright.distributed.replay.runs import Inputs
from shardwright.distributed.replay.weightless import WeightlessCopy
from shardwright.distributed.runtime.context.places import argument_names


class Pointwise(Recorder):
    """Answers the stubs, each position by itself."""

    def linear(self, name: str, x: Tensor, width: int) -> Tensor:
        generator = _generator(name)
        picked = torch.randint(x.shape[-1], (width,), generator=generator)
        scale = torch.randn(width, generator=generator).sign() * (0.5 + torch.rand(width, generator=generator))
        return x.float()[..., picked] * scale + 0.1 * torch.randn(width, generator=generator)

    def table(self, name: str, ids: Tensor, width: int) -> Tensor:
        frequencies = 10 * torch.rand(width, generator=_generator(name))
        return torch.sin((ids.unsqueeze(-1) + 1) * frequencies)

    def opaque(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        first = first_float(args, kwargs).float()
        result = 0.5 * first
        for other in (*args, *kwargs.values()):
            # What it is told of every token besides (which experts, how much of each) must show, too.
            if isinstance(other, Tensor) and other is not first and _of_tokens(other, first):
                told = torch.nan_to_num(other.float()).reshape(*first.shape[:-1], -1)
                result = result + 0.1 * torch.sin(told * torch.arange(1, told.shape[-1] + 1)).sum(-1, keepdim=True)
        return result


def _of_tokens(x: Tensor, first: Tensor) -> bool:
    """Whether ``x`` has a row for every token of ``first``, ``[..., features]``."""
    tokens = first.shape[:-1]
    return x.ndim > 0 and (x.shape[: len(tokens)] == tokens or x.shape[0] == tokens.numel())


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def copied(value: Any) -> Any:
    """The tensors as they are now, in lists where they were in lists."""
    if isinstance(value, UserDict):
        return with_items(value, copied)
    if type(value) in (tuple, list):
        return type(value)(copied(item) for item in value)
    return {key: copied(item) for key, item in value.items()} if type(value) is dict else as_now(value)


def with_items(handed: UserDict[Any, Any], change: Callable[[Any], Any]) -> UserDict[Any, Any]:
    """A dict of the class of ``handed``, by which modules hand each other tensors, with other items."""
    new = copy(handed)
    for key, item in handed.items():
        new[key] = change(item)
    return new


def handed_over(
    names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, UserDict[Any, Any]]:
    """The arguments that are dicts by which modules hand each other tensors (the keys and values of another layer).

    They are no plain ``dict``: what copies arguments (FSDP2, a hook) leaves them alone, so that writes are seen.
    """
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    return {name: value for name, value in named.items() if isinstance(value, UserDict)}


def is_pointwise_norm(norm: nn.Module) -> bool:
    """Whether a module that owns vectors alone gives the same for every position, whatever the others are.

    Tried on a copy with numbers of its own; what needs running statistics, or something else to be called with, is not.
    """
    generator = torch.Generator().manual_seed(0)
    vectors = {
        name: torch.randn(param.shape, generator=generator, dtype=torch.float32)
        for name, param in norm._parameters.items()
        if param is not None
    }
    x = torch.randn(2, 6, next(iter(vectors.values())).numel(), generator=generator)
    copy = deepcopy(norm)
    try:
        with torch.no_grad():
            whole, part = functional_call(copy, vectors, (x,)), functional_call(copy, vectors, (x[:, 2:4],))
    except CODE_ERRORS:
        return False
    return isinstance(whole, Tensor) and whole.shape == x.shape and same(part, whole[:, 2:4])


@dataclass
class PointwiseRun:
    """What every module inside of some blocks was called with, by copied name."""

    calls: dict[str, list[ModuleCall]] = field(default_factory=dict)


@contextmanager
def pointwise(weightless: WeightlessCopy) -> Iterator[None]:
    """Inside, the copy's layers answer so, nothing has a gradient, and scans have short chunks."""
    weightless.recorder = Pointwise()
    try:
        fork = torch.random.fork_rng(devices=[])
        with torch.no_grad(), fork, weightless.chunks.shortened():
            torch.default_generator.manual_seed(0)
            yield
    finally:
        weightless.recorder = Idle()


def pointwise_run(weightless: WeightlessCopy, inputs: Inputs, watched: Mapping[str, nn.Module]) -> PointwiseRun:
    """Run the copy once and note the calls of ``watched`` modules.

    Raises:
        CODE_ERRORS: the model's code does not run so.
    """
    run, hooks = PointwiseRun(), []
    for name, module in watched.items():
        begun: list[tuple[Any, Any]] = []

        def before(module: nn.Module, args: Any, kwargs: Any, begun: list[Any] = begun) -> None:
            begun.append((copied(args), copied(kwargs)))

        def after(
            module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name, begun: list[Any] = begun
        ) -> None:
            left = copied(handed_over(argument_names(module), args, kwargs))
            were = begun.pop()
            run.calls.setdefault(name, []).append(ModuleCall(were[0], were[1], copied(output), left))

        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        with pointwise(weightless):
            weightless.model.get_submodule(inputs.called)(*as_now(inputs.args), **as_now(dict(inputs.kwargs)))
    finally:
        for handle in hooks:
            handle.remove()
    return run
