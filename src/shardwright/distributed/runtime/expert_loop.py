"""Code that calls experts one after another, run so that all of them can be computed together.

The code wants the first expert's result before it says what the second is called with. So it runs twice. In the first
run (*asking*) every expert is replaced by one that notes what it is called with and returns zeros. Then the experts are
computed, wherever they are, and in the second run (*answering*) each call gets its result. What the code does with the
results, and how it chooses what goes where, is its own business.

Everything but the experts happens once. A module that is called in the first run, with nothing that came out of an
expert, keeps its result for the second run, and is not called there: its hooks, counters and random numbers are those
of one run. What the code itself does to its attributes, buffers, arguments and the random state in the first run is
taken back. Which tensors have come out of experts is followed through every operation on them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shardwright._torch import storage_key, tree_leaves, tree_map_only
from shardwright.distributed.runtime.expert_calls import ExpertCall
from shardwright.distributed.runtime.forward import Forward
from shardwright.errors import UnsupportedError

CONTAINERS = (nn.ModuleList, nn.ModuleDict)
# Functions that hand values to Python, or make shapes of them.
_LOOKS = frozenset(
    ["item", "tolist", "numpy", "nonzero", "argwhere", "unique", "__bool__", "__int__", "__float__", "__index__"]
)


@dataclass(frozen=True)
class Loop:
    """Where a module has the experts that its code calls.

    Attributes:
        container: the name, below the module, of what holds them; empty where it does so itself.
        experts: their names in the container, in its order.
    """

    container: str
    experts: tuple[str, ...]

    def modules(self, module: nn.Module) -> list[nn.Module]:
        """The experts of ``module``."""
        container = module.get_submodule(self.container)
        return [container.get_submodule(name) for name in self.experts]


Like = Callable[[ExpertCall], Tensor]
Answer = Callable[[list[ExpertCall]], list[Tensor]]


def run_together(
    module: nn.Module,
    loop: Loop,
    forward: Forward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    like: Like,
    answer: Answer,
) -> Any:
    """The result of ``forward``, with the experts of ``loop`` computed together.

    Args:
        module: whose forward it is.
        like: zeros in the form of a call's result.
        answer: the results of all calls.

    Raises:
        UnsupportedError: one expert is called with what another returned, or the code looks at results.
    """
    asking = _Asking(module, loop, like)
    asking.run(forward, args, kwargs)
    results = answer(asking.calls)
    return _Answering(module, loop, asking, results).run(forward, args, kwargs)


class _StandIn:
    """In the place of a module: calls go elsewhere, everything else is the module's own.

    It is no module, so that hooks on all modules see each call once.
    """

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self.__dict__.update(_module=module, _call=call)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_call"](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_module"], name, value)


Place = tuple[str, int]  # the name of a module below the one that runs, and the number of its call


@dataclass
class _Kept:
    """What a module returned, and the random state after it."""

    result: Any
    state: list[Tensor]


class _Run:
    """One of the two runs."""

    def __init__(self, module: nn.Module, loop: Loop) -> None:
        self.module, self.loop = module, loop
        self.made: dict[str, int] = defaultdict(int)

    def expert(self, place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    def other(self, name: str, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The modules that the code calls are replaced inside."""
        owners = dict(self._owners("", self.module))
        before = {name: dict(owner._modules) for name, owner in owners.items()}
        try:
            for name, owner in owners.items():
                for child, part in before[name].items():
                    path = f"{name}.{child}" if name else child
                    if part is not None and path not in owners:
                        stand_in: Any = self._stand_in(name, child, path, part)
                        owner._modules[child] = stand_in
            yield
        finally:
            for name, owner in owners.items():
                owner._modules.update(before[name])

    def _owners(self, name: str, owner: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The module, what is on the way from it to the experts, and what is never called, with names."""
        yield name, owner
        for child, part in owner.named_children():
            path = f"{name}.{child}" if name else child
            if f"{self.loop.container}.".startswith(f"{path}.") or isinstance(part, CONTAINERS):
                yield from self._owners(path, part)

    def _stand_in(self, owner: str, child: str, path: str, part: nn.Module) -> _StandIn:
        if owner == self.loop.container and child in self.loop.experts:
            place = self.loop.experts.index(child)
            return _StandIn(part, lambda *args, **kwargs: self.expert(place, args, kwargs))
        return _StandIn(part, lambda *args, **kwargs: self.other(path, part, args, kwargs))

    def numbered(self, name: str) -> Place:
        self.made[name] += 1
        return name, self.made[name]


class _Asking(_Run):
    """Notes what experts are called with."""

    def __init__(self, module: nn.Module, loop: Loop, like: Like) -> None:
        super().__init__(module, loop)
        self.like = like
        self.calls: list[ExpertCall] = []
        self.kept: dict[Place, _Kept] = {}
        self.results = _Results()

    def run(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        args, kwargs = tree_map_only(Tensor, _copy, (args, kwargs))  # code may write into what it is given
        state = _random_states(self.module)
        with _taken_back([self.module]), self.in_place(), self.results:
            forward(*args, **kwargs)
        _set_random_states(self.module, state)

    def expert(self, place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.results.among((args, kwargs)):
            raise UnsupportedError(
                f"{type(self.module).__name__} calls an expert with what another expert returned, so that they cannot "
                "be computed at the same time on different ranks. Leave ep out."
            )
        call = ExpertCall.of(place, args, kwargs)
        self.calls.append(call)
        result = self.like(call)
        self.results.add(result)
        return result

    def other(self, name: str, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place = self.numbered(name)
        if self.results.among((args, kwargs)):  # zeros went in: it is called again, with the experts' results
            with _taken_back(list(part.modules())):
                return part(*args, **kwargs)
        result = part(*args, **kwargs)
        self.kept[place] = _Kept(result, _random_states(self.module))
        return tree_map_only(Tensor, _copy, result)  # code may write into it


class _Answering(_Run):
    """Gives every call its result."""

    def __init__(self, module: nn.Module, loop: Loop, asking: _Asking, results: list[Tensor]) -> None:
        super().__init__(module, loop)
        self.asking = asking
        self.answers = list(zip(asking.calls, results, strict=True))
        self.answers.reverse()

    def run(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.in_place():
            output = forward(*args, **kwargs)
        if self.answers:
            self._differs()
        return output

    def expert(self, place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call, result = self.answers.pop() if self.answers else (None, None)
        now = ExpertCall.of(place, args, kwargs)
        if call is None or result is None or call.expert != place or call.lead != now.lead:
            self._differs()
        return result if torch.is_grad_enabled() or result is None else result.detach()

    def other(self, name: str, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kept = self.asking.kept.get(self.numbered(name))
        if kept is None:
            return part(*args, **kwargs)
        _set_random_states(self.module, kept.state)
        return kept.result

    def _differs(self) -> None:
        raise UnsupportedError(
            f"{type(self.module).__name__} calls other experts, or with other tokens, when it runs once more, so that "
            "its experts cannot be computed on other ranks. Leave ep out."
        )


class _Results(TorchFunctionMode):
    """Knows which tensors have come out of experts."""

    def __init__(self) -> None:
        super().__init__()
        self._keys: set[int] = set()
        self._alive: list[Any] = []  # so that no other tensor gets the memory of one of them

    def add(self, value: Any) -> None:
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor):
                self._keys.add(storage_key(tensor))
                self._alive.append(tensor)

    def among(self, values: Any) -> bool:
        """Whether one of ``values`` has."""
        return bool(self._keys) and any(
            isinstance(leaf, Tensor) and storage_key(leaf) in self._keys for leaf in tree_leaves(values)
        )

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        read = self.among((args, kwargs))
        if read and func.__name__ in _LOOKS:
            raise UnsupportedError(
                f"The code that calls the experts looks at what they return ({func.__name__}), so that they cannot be "
                "computed at the same time on different ranks. Leave ep out."
            )
        result = func(*args, **(kwargs or {}))
        if read:
            self.add(result)
            if func.__name__ == "__setitem__":
                self.add(args[0])
        return result


def _copy(x: Tensor) -> Tensor:
    return x.clone()


@contextmanager
def _taken_back(modules: Sequence[nn.Module]) -> Iterator[None]:
    """What is done to the attributes and buffers of ``modules`` inside is undone."""
    attributes = [dict(vars(module)) for module in modules]
    buffers = [dict(module._buffers) for module in modules]
    try:
        for module, own in zip(modules, buffers, strict=True):
            module._buffers.update({name: buffer if buffer is None else buffer.clone() for name, buffer in own.items()})
        yield
    finally:
        for module, before, own in zip(modules, attributes, buffers, strict=True):
            vars(module).clear()
            vars(module).update(before)
            module._buffers.clear()
            module._buffers.update(own)


def _random_states(module: nn.Module) -> list[Tensor]:
    device = _device(module)
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _set_random_states(module: nn.Module, states: list[Tensor]) -> None:
    device = _device(module)
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1], device)


def _device(module: nn.Module) -> torch.device:
    return next((param.device for param in module.parameters()), torch.device("cpu"))
