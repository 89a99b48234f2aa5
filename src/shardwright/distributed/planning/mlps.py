"""Which parts of the blocks work on every position by itself: they can be computed a part of the sequence at a time.

Candidates are the children of the blocks that the recorded run called with one tensor, and that returned one of the
same positions. Whether positions are kept apart is found by running the child on all of them and on two parts, in the
copy without weights, where every linear layer is a small product of its own. Children that choose by values (experts
behind a router) are left alone: they count their tokens, and losses read that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from shardwright.distributed.replay.module_calls import ModuleCall
from shardwright.distributed.replay.reading import ModelReading, Recording
from shardwright.distributed.replay.record import CODE_ERRORS, Idle, Mismatch, Recorder, same
from shardwright.distributed.replay.weightless import WeightlessCopy

_RANK = 4  # of the products that stand for linear layers
_CHOOSE = "topk sort argsort nonzero one_hot index_add index_add_ scatter scatter_ multinomial unique"
CHOICES = frozenset(_CHOOSE.split())


def mlp_names(reading: ModelReading) -> list[str]:
    """The children of the blocks that hold linear layers and work on every position by itself, in the model's order."""
    recording = reading.recording()
    if recording is None:
        return []
    repeats, kinds = recording.weightless.repeats, _kinds(recording)
    children = [f"{block}.{child}" for block in reading.blocks for child, _ in reading.modules[block].named_children()]
    return [name for name in children if repeats.kind_of(name) in kinds]


def _kinds(recording: Recording) -> set[str]:
    weightless = recording.weightless
    found: dict[str, bool] = {}
    for name, calls in recording.record.calls.of_blocks.items():
        kind = weightless.repeats.kind_of(weightless.repeats.original_name(name))
        works = all(_keeps_positions(call) for call in calls)
        works = works and _widens(weightless, name, calls[0].args[0].shape[-1])
        works = works and _keeps_apart(weightless, name, calls[0].args[0])
        found[kind] = found.get(kind, True) and works
    return {kind for kind, works in found.items() if works}


def _keeps_positions(call: ModuleCall) -> bool:
    """Whether a call takes one tensor ``[..., positions, features]`` and returns one of the same positions."""
    x = call.args[0] if len(call.args) == 1 and not call.kwargs else None
    return (
        isinstance(x, Tensor)
        and x.is_floating_point()
        and x.ndim in (2, 3)
        and isinstance(call.output, Tensor)
        and call.output.shape[:-1] == x.shape[:-1]
    )


def _widens(weightless: WeightlessCopy, name: str, features: int) -> bool:
    """Whether the layers below are linear, and make more than ``features`` of a position: that is what tiles save."""
    stubs = [stub for inner, stub in weightless.stubs.items() if inner.startswith(f"{name}.")]
    return all(stub.kind == "linear" for stub in stubs) and any(stub.width_out > features for stub in stubs)


def _keeps_apart(weightless: WeightlessCopy, name: str, like: Tensor) -> bool:
    module = weightless.model.get_submodule(name)
    x = torch.randn(*like.shape[:-2], 6, like.shape[-1], generator=torch.Generator().manual_seed(1))
    weightless.recorder = _Products()
    try:
        with torch.no_grad(), _NoChoices():
            whole, parts = module(x), torch.cat([module(x[..., :2, :]), module(x[..., 2:, :])], -2)
    except (Mismatch, *CODE_ERRORS):
        return False
    finally:
        weightless.recorder = Idle()
    return same(parts, whole)


class _Products(Recorder):
    """Answers every linear layer with a product of low rank: a function of its input, and of each position alone."""

    def linear(self, name: str, x: Tensor, width: int) -> Tensor:
        generator = torch.Generator().manual_seed(_seed_of(name))
        down = torch.randn(x.shape[-1], _RANK, generator=generator) / x.shape[-1] ** 0.5
        return x @ down @ torch.randn(_RANK, width, generator=generator)

    def table(self, name: str, ids: Tensor, width: int) -> Tensor:
        raise Mismatch(name)

    def opaque(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        raise Mismatch(name)


def _seed_of(name: str) -> int:
    """The same for the same name in every process."""
    return sum(place * ord(letter) for place, letter in enumerate(name, 1))


class _NoChoices(TorchFunctionMode):
    """Refuses functions that choose by values."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.__name__ in CHOICES:
            raise Mismatch(func.__name__)
        return func(*args, **(kwargs or {}))
