"""Which blocks can run on a part of the sequence: found by running them so.

A copy of the model without its weights runs once in full. Then every block runs again on the parts that two ranks would
have, with its regions answering as they would under sequence parallelism: given the right part, they return the right
part. A block whose result is not the part it should be (its own code mixes positions, flattens the batch, hands the
stream to a region in a second argument, ...) stays on the whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.distributed.models.blocks import block_names
from shardwright.distributed.replay.inputs import candidate_inputs
from shardwright.distributed.replay.record import CODE_ERRORS, Mismatch
from shardwright.distributed.replay.runs import forward_run
from shardwright.distributed.replay.weightless import WeightlessCopy, weightless_copy
from shardwright.distributed.runtime.regions import SEQUENCE_DIM, first_argument

RANKS = 2


class Unsplit(Exception):
    """A block cannot run on a part of the sequence; the message says why."""


@dataclass
class Call:
    """One call of a module in the full run."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass
class Trial:
    """A model without weights, and what its blocks and their children were called with."""

    weightless: WeightlessCopy
    calls: dict[str, list[Call]] = field(default_factory=dict)


def unsplittable_blocks(model: nn.Module, blocks: list[str], is_region: Callable[[str], bool]) -> dict[str, str]:
    """The blocks that cannot run on a part of the sequence, with the reason.

    Args:
        blocks: names of the blocks in question.
        is_region: whether a module of this name gathers the sequence for itself.
    """
    trial = _record(model)
    if isinstance(trial, str):
        return dict.fromkeys(blocks, trial)
    verdicts: dict[str, str | None] = {}
    for name in block_names(trial.weightless.model):
        original = trial.weightless.repeats.original_name(name)
        verdicts[trial.weightless.repeats.kind_of(original)] = _verdict(trial, name, is_region)
    found = {
        name: verdicts.get(trial.weightless.repeats.kind_of(name), "it did not run in the trial") for name in blocks
    }
    return {name: reason for name, reason in found.items() if reason is not None}


def _record(model: nn.Module) -> Trial | str:
    reason = "its inputs could not be guessed"
    for inputs in candidate_inputs(model):
        trial = Trial(weightless_copy(model))
        handles = [handle for block in block_names(trial.weightless.model) for handle in _listen(trial, block)]
        try:
            forward_run(trial.weightless, inputs)
        except (Mismatch, *CODE_ERRORS) as error:
            reason = f"the trial run failed ({type(error).__name__}: {error})".partition("\n")[0]
            continue
        finally:
            for handle in handles:
                handle.remove()
        return trial
    return reason


def _listen(trial: Trial, block: str) -> Iterator[Any]:
    module = trial.weightless.model.get_submodule(block)
    names = [block, *(f"{block}.{child}" for child, _ in module.named_children())]
    for name in names:

        def note(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, name: str = name
        ) -> None:
            trial.calls.setdefault(name, []).append(Call(_kept(args), _kept(kwargs), _kept(output)))

        yield trial.weightless.model.get_submodule(name).register_forward_hook(note, with_kwargs=True)


def _kept(value: Any) -> Any:
    """The values as they are now; a later operation in place does not reach them."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {key: _kept(item) for key, item in value.items()}
    return tuple(_kept(item) for item in value) if type(value) in (tuple, list) else value


def _verdict(trial: Trial, block: str, is_region: Callable[[str], bool]) -> str | None:
    calls = trial.calls.get(block)
    if not calls:
        return "it did not run in the trial"  # a tower whose inputs the trial does not have, or a block out of use
    try:
        for rank in range(RANKS):
            _replay(trial, block, calls[0], rank, is_region)
    except Unsplit as error:
        return str(error)
    except CODE_ERRORS as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return None


def _replay(trial: Trial, block: str, call: Call, rank: int, is_region: Callable[[str], bool]) -> None:
    module = trial.weightless.model.get_submodule(block)
    name, stream = _first(module, call)
    length = stream.shape[SEQUENCE_DIM] if stream.ndim == 3 else 0
    if length < RANKS:
        raise Unsplit(f"its input has shape {tuple(stream.shape)}, not [batch, sequence, features]")
    with ExitStack() as stack, torch.no_grad():
        for child, part in module.named_children():
            path = f"{block}.{child}"
            region = is_region(trial.weightless.repeats.original_name(path))
            if (region or path in trial.weightless.stubs) and path in trial.calls:
                stack.enter_context(_answering(part, child, iter(trial.calls[path]), length, rank, region))
        args, kwargs = _with_first(call, name, _part(stream, length, rank))
        result = module(*args, **kwargs)
    if not _same(_leading(result), _part(_leading(call.output), length, rank)):
        raise Unsplit("its own code mixes positions")


@contextmanager
def _answering(
    module: nn.Module, child: str, calls: Iterator[Call], length: int, rank: int, region: bool
) -> Iterator[None]:
    """Let a child of a block answer with this rank's part of what it returned in the full run."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = next(calls, None)
        if call is None:
            raise Unsplit(f"{child} is called more often on a part of the sequence")
        _check_arguments(module, child, call, Call(args, kwargs, None), length, rank)
        others = call.output[1:] if isinstance(call.output, tuple) else ()
        if region and any(isinstance(other, Tensor) and other.requires_grad for other in others):
            raise Unsplit(f"{child} returns more than one tensor with a gradient")
        part = _part(_leading(call.output), length, rank)
        return (part, *others) if isinstance(call.output, tuple) else part

    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


def _check_arguments(module: nn.Module, child: str, full: Call, now: Call, length: int, rank: int) -> None:
    name, stream = _first(module, full)
    args, kwargs = _with_first(full, name, _part(stream, length, rank))
    pairs = [*zip(args, now.args, strict=True), *((kwargs[key], now.kwargs.get(key)) for key in kwargs)]
    for expected, got in pairs:
        if isinstance(expected, Tensor) and not (isinstance(got, Tensor) and _same(got, expected)):
            raise Unsplit(f"{child} needs more of the sequence than its first argument brings")


def _first(module: nn.Module, call: Call) -> tuple[str | None, Tensor]:
    """Where a call has its first argument (None: by position), and the argument."""
    name = None if call.args else first_argument(module)
    value = call.args[0] if name is None else call.kwargs.get(name)
    if not isinstance(value, Tensor):
        raise Unsplit("its first argument is not a tensor")
    return name, value


def _with_first(call: Call, name: str | None, value: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if name is None:
        return (value, *call.args[1:]), call.kwargs
    return call.args, {**call.kwargs, name: value}


def _leading(value: Any) -> Tensor:
    value = value[0] if isinstance(value, tuple) and value else value
    if not isinstance(value, Tensor):
        raise Unsplit(f"it returns a {type(value).__name__}")
    return value


def _part(x: Tensor, length: int, rank: int) -> Tensor:
    """A rank's part of ``[batch, sequence, features]`` or ``[batch * sequence, features]``."""
    if x.ndim == 2 and x.shape[0] % length == 0:
        return x.unflatten(0, (-1, length)).chunk(RANKS, SEQUENCE_DIM)[rank].flatten(0, 1)
    if x.ndim != 3 or x.shape[SEQUENCE_DIM] != length:
        raise Unsplit(f"a tensor of shape {tuple(x.shape)} stands where the stream should")
    return x.chunk(RANKS, SEQUENCE_DIM)[rank]


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5) if a.is_floating_point() else bool((a == b).all())
