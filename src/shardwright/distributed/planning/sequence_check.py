"""Which blocks can run on a part of the sequence: found by running them so.

Every block of the recorded run runs again on the parts that two ranks would have, with its regions answering as they
would under sequence parallelism: given the right part, they return the right part. A block whose result is not the part
it should be (its own code mixes positions, flattens the batch, hands the stream to a region in a second argument, ...)
stays on the whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.distributed.models.blocks import block_names
from shardwright.distributed.replay.module_calls import ModuleCall
from shardwright.distributed.replay.reading import ModelReading, Recording
from shardwright.distributed.replay.record import CODE_ERRORS, same
from shardwright.distributed.runtime.regions import SEQUENCE_DIM, first_argument

RANKS = 2


class Unsplit(Exception):
    """A block cannot run on a part of the sequence; the message says why."""


def unsplittable_blocks(reading: ModelReading, blocks: list[str], is_region: Callable[[str], bool]) -> dict[str, str]:
    """The blocks that cannot run on a part of the sequence, with the reason.

    Args:
        blocks: names of the blocks in question.
        is_region: whether a module of this name gathers the sequence for itself.
    """
    recording = reading.recording()
    if recording is None:
        return dict.fromkeys(blocks, reading.why_not())
    repeats = recording.weightless.repeats
    verdicts: dict[str, str | None] = {}
    for name in block_names(recording.weightless.model):
        verdicts[repeats.kind_of(repeats.original_name(name))] = _verdict(recording, name, is_region)
    found = {name: verdicts.get(repeats.kind_of(name), "it did not run in the trial") for name in blocks}
    return {name: reason for name, reason in found.items() if reason is not None}


def _verdict(recording: Recording, block: str, is_region: Callable[[str], bool]) -> str | None:
    calls = recording.record.calls.of_blocks.get(block)
    if not calls:
        return "it did not run in the trial"  # a tower whose inputs the trial does not have, or a block out of use
    try:
        for rank in range(RANKS):
            _replay(recording, block, calls[0], rank, is_region)
    except Unsplit as error:
        return str(error)
    except CODE_ERRORS as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return None


def _replay(recording: Recording, block: str, call: ModuleCall, rank: int, is_region: Callable[[str], bool]) -> None:
    weightless, calls = recording.weightless, recording.record.calls.of_blocks
    module = weightless.model.get_submodule(block)
    name, stream = _first(module, call)
    length = stream.shape[SEQUENCE_DIM] if stream.ndim == 3 else 0
    if length < RANKS:
        raise Unsplit(f"its input has shape {tuple(stream.shape)}, not [batch, sequence, features]")
    with ExitStack() as stack, torch.no_grad(), weightless.chunks.shortened():
        for child, part in module.named_children():
            path = f"{block}.{child}"
            region = is_region(weightless.repeats.original_name(path))
            if (region or path in weightless.stubs) and path in calls:
                stack.enter_context(_answering(part, child, iter(calls[path]), length, rank, region))
        args, kwargs = _with_first(call, name, _part(stream, length, rank))
        result = module(*args, **kwargs)
    if not same(_leading(result), _part(_leading(call.output), length, rank)):
        raise Unsplit("its own code mixes positions")


@contextmanager
def _answering(
    module: nn.Module, child: str, calls: Iterator[ModuleCall], length: int, rank: int, region: bool
) -> Iterator[None]:
    """Let a child of a block answer with this rank's part of what it returned in the full run."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = next(calls, None)
        if call is None:
            raise Unsplit(f"{child} is called more often on a part of the sequence")
        _check_arguments(module, child, call, ModuleCall(args, kwargs, None), length, rank)
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


def _check_arguments(module: nn.Module, child: str, full: ModuleCall, now: ModuleCall, length: int, rank: int) -> None:
    name, stream = _first(module, full)
    args, kwargs = _with_first(full, name, _part(stream, length, rank))
    pairs = [*zip(args, now.args, strict=True), *((kwargs[key], now.kwargs.get(key)) for key in kwargs)]
    for expected, got in pairs:
        if isinstance(expected, Tensor) and not (isinstance(got, Tensor) and same(got, expected)):
            raise Unsplit(f"{child} needs more of the sequence than its first argument brings")


def _first(module: nn.Module, call: ModuleCall) -> tuple[str | None, Tensor]:
    """Where a call has its first argument (None: by position), and the argument."""
    name = None if call.args else first_argument(module)
    value = call.args[0] if name is None else call.kwargs.get(name)
    if not isinstance(value, Tensor):
        raise Unsplit("its first argument is not a tensor")
    return name, value


def _with_first(call: ModuleCall, name: str | None, value: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
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
