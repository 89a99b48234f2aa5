"""A weightless copy as one rank would have it: parameters cut, sizes local, arguments cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from shardwright.distributed.replay.record import RankRun
from shardwright.distributed.replay.watch import bind
from shardwright.distributed.runtime.local_arguments import ArgumentCut
from shardwright.distributed.runtime.local_sizes import LocalSizes
from shardwright.distributed.runtime.local_width import stand_in
from shardwright.distributed.styles.cuts import Cut


@dataclass
class Sharding:
    """One way to run the model on slices. All names are copied names.

    Attributes:
        cuts_in: stub -> how its input is cut.
        cuts_out: stub -> how its output is cut.
        parameters: parameter -> how its dim 0 is cut.
        attributes: module -> values of its attributes on a rank; ``config.name`` for a config's.
        arguments: module -> arguments that are cut.
        widths: module -> the argument whose width its code sees divided by the number of ranks.
    """

    cuts_in: dict[str, Cut] = field(default_factory=dict)
    cuts_out: dict[str, Cut] = field(default_factory=dict)
    parameters: dict[str, Cut] = field(default_factory=dict)
    attributes: dict[str, dict[str, int]] = field(default_factory=dict)
    arguments: dict[str, tuple[ArgumentCut, ...]] = field(default_factory=dict)
    widths: dict[str, str] = field(default_factory=dict)

    def with_(self, other: Sharding) -> Sharding:
        return Sharding(
            self.cuts_in | other.cuts_in,
            self.cuts_out | other.cuts_out,
            self.parameters | other.parameters,
            {m: self.attributes.get(m, {}) | other.attributes.get(m, {}) for m in self.attributes | other.attributes},
            self.arguments | other.arguments,
            self.widths | other.widths,
        )


@contextmanager
def as_on_rank(model: nn.Module, sharding: Sharding, run: RankRun) -> Iterator[None]:
    """The model as this rank has it: parameters cut, attributes divided, arguments cut."""
    rank, size = run.rank, run.size
    with ExitStack() as stack:
        for name, cut in sharding.parameters.items():
            owner, _, key = name.rpartition(".")
            parameters = model.get_submodule(owner)._parameters
            param = parameters[key]
            assert param is not None
            local = nn.Parameter(cut.take(param.detach(), 0, rank, size), requires_grad=param.requires_grad)
            stack.callback(parameters.__setitem__, key, param)
            parameters[key] = local
        for module_name, values in sharding.attributes.items():
            module = model.get_submodule(module_name)
            stack.enter_context(LocalSizes(module, values).on(module))
        for module_name, cuts in sharding.arguments.items():
            module = model.get_submodule(module_name)
            hook = module.register_forward_pre_hook(_argument_hook(cuts, rank, size), with_kwargs=True)
            stack.callback(hook.remove)
        for module_name, argument in sharding.widths.items():
            module = model.get_submodule(module_name)
            hook = module.register_forward_pre_hook(_width_hook(argument, run), with_kwargs=True)
            stack.callback(hook.remove)
        yield


def _argument_hook(cuts: tuple[ArgumentCut, ...], rank: int, size: int) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = bind(module, args, kwargs)
        for cut in cuts:
            value = bound.arguments.get(cut.argument, kwargs.get(cut.argument))
            if isinstance(value, Tensor):
                local = cut.take(value, rank, size)
                if cut.argument in bound.arguments:
                    bound.arguments[cut.argument] = local
                else:
                    bound.kwargs[cut.argument] = local
        return bound.args, bound.kwargs

    return hook


def _width_hook(argument: str, run: RankRun) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = bind(module, args, kwargs)
        x = bound.arguments[argument]
        bound.arguments[argument] = stand_in(x, run.size)
        run.stand_ins.append((bound.arguments[argument], x))
        return bound.args, bound.kwargs

    return hook
