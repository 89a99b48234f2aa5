"""Which modules can be gathered, recomputed or compiled by themselves: read off a run of a copy without weights.

Whatever wraps a module (FSDP2's gather, a checkpoint, a compiled graph) acts around the module's own forward. A block
whose children are called by its parent, whose weights other code reads, or whose backward is written by hand (a
reversible network) would be used while it is not gathered. The largest modules in it that are only used while they run
take its place, and what is in none of them belongs to the root.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.distributed.tensor import DTensor

from shardwright.distributed.models.blocks import is_block, numbers_to_globs
from shardwright.distributed.replay.reading import ModelReading, Recording

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # never called


def unit_names(reading: ModelReading) -> list[str]:
    """The names of the modules to gather, recompute or compile one by one, in the model's order.

    These are the repeated blocks, but for those that are used while they do not run. All blocks, where the model cannot
    be run without its weights: its inputs cannot be guessed, or its parameters are DTensors already.
    """
    model, blocks = reading.model, reading.blocks
    if not blocks or any(isinstance(param, DTensor) for param in model.parameters()):
        return blocks
    recording = reading.recording()
    if recording is None:
        return blocks
    return [unit for block in blocks for unit in _usable(model, block, recording)]


def blocks_in_use(reading: ModelReading, units: list[str]) -> str | None:
    """A sentence about the blocks that are not among ``units``; None where all are."""
    replaced = dict.fromkeys(numbers_to_globs(block) for block in reading.blocks if block not in units)
    if not replaced:
        return None
    taken = dict.fromkeys(numbers_to_globs(unit) for unit in units if unit not in reading.blocks)
    rest = f"{', '.join(taken)} are, and the rest is the root's" if taken else "all of them is the root's"
    return (
        f"{type(reading.model).__name__} uses {', '.join(replaced)} while they do not run, so they cannot be units of "
        f"FSDP2 or of activation checkpointing: {rest}."
    )


def _usable(model: nn.Module, name: str, recording: Recording) -> Iterator[str]:
    """``name``, or the largest modules below it that are only used while they run."""
    module, record = model.get_submodule(name), recording.record
    if not isinstance(module, _CONTAINERS):
        kind = recording.weightless.repeats.kind_of(name)
        trained = any(param.requires_grad for param in module.parameters())
        if kind not in record.idle and not (trained and kind in record.without_gradient):
            yield name
            return
    for child, part in module.named_children():
        if is_block(part):
            yield from _usable(model, f"{name}.{child}", recording)
