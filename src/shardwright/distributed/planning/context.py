"""Context parallelism: what of a model runs on a part of the sequence.

Decided from the code alone, kind of block by kind of block. Every answer is exact; they differ in what is computed by
all ranks alike: a block whose code needs it sees the whole sequence, or those of its children do which need it, or only
keys and values are gathered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from shardwright._transformers import call_of_experts, recorded_modules
from shardwright.distributed.models.attention import attention_name
from shardwright.distributed.models.blocks import block_names, is_norm, numbers_to_globs
from shardwright.distributed.planning.context_method import ContextMethod
from shardwright.distributed.planning.context_plan import ContextPlan, SplitAttention, SplitBlock
from shardwright.distributed.replay.context_answers import AttentionFinding
from shardwright.distributed.replay.context_parts import BlockFinding, BlockReplay, Unsplit
from shardwright.distributed.replay.module_calls import ModuleCall
from shardwright.distributed.replay.pointwise import is_pointwise_norm, pointwise_run
from shardwright.distributed.replay.reading import ModelReading, Recording
from shardwright.distributed.replay.record import CODE_ERRORS, Mismatch
from shardwright.distributed.replay.runs import Inputs
from shardwright.distributed.replay.weightless import WeightlessCopy
from shardwright.distributed.runtime.context.attention import KERNELS
from shardwright.distributed.runtime.context.places import Places
from shardwright.errors import PlanError


def plan_context(reading: ModelReading, method: ContextMethod | None = None) -> ContextPlan:
    """Look at every kind of block.

    Args:
        method: how attention is to see all positions; by default it gathers keys and values.

    Raises:
        PlanError: nothing of the model would be split, or some attention cannot work as ``method`` says.
    """
    recording = reading.recording()
    name = type(reading.model).__name__
    if recording is None:
        raise PlanError(
            f"{name} cannot be split along the sequence: {reading.why_not()}, and what its blocks do to positions is "
            "found by running it without weights. Use cp=1, or pass example inputs."
        )
    findings, failures = _by_kind(reading, recording)
    plan = _spread(reading, recording.weightless, findings, failures, method or ContextMethod())
    if not plan.blocks:
        reasons = "; ".join(f"{numbers_to_globs(block)}: {why}" for block, why in _few(plan.whole))
        raise PlanError(
            f"Context parallelism would do nothing for {name}: no block of it can run on a part of the sequence"
            + (f" ({reasons})" if reasons else "")
            + ". Use cp=1 and give those ranks to dp_shard or tp."
        )
    return plan


def _few(whole: Mapping[str, str]) -> list[tuple[str, str]]:
    seen: dict[tuple[str, str], None] = {}
    for name, why in whole.items():
        seen.setdefault((numbers_to_globs(name), why))
    return list(seen)[:3]


def _by_kind(reading: ModelReading, recording: Recording) -> tuple[dict[str, BlockFinding], dict[str, str]]:
    """What was found of every kind of block, under the names of the first copy of it; why nothing could be."""
    weightless = recording.weightless
    blocks = block_names(weightless.model)
    try:
        runs = list(_runs(weightless, recording.inputs, blocks))
    except (Mismatch, *CODE_ERRORS) as error:
        return {}, {
            kind: f"{type(error).__name__}: {error}" for kind in map(weightless.repeats.kind_of, reading.blocks)
        }
    ids = recording.inputs.kwargs.get("input_ids")
    length = ids.shape[-1] if isinstance(ids, torch.Tensor) else 0
    findings: dict[str, BlockFinding] = {}
    failures: dict[str, str] = {}
    for block in blocks:
        kind = weightless.repeats.kind_of(weightless.repeats.original_name(block))
        try:
            found = _finding(reading, weightless, block, runs, length, findings.get(kind))
        except Unsplit as error:
            failures[kind] = str(error)
            continue
        if kind in findings and _moved(findings[kind]) != _moved(found):
            failures[kind] = "blocks of this kind are called differently"
        findings[kind] = found
    _together_or_not(findings, failures, _handed_kinds(weightless, runs, blocks))
    return {kind: found for kind, found in findings.items() if kind not in failures}, failures


def _handed_kinds(
    weightless: WeightlessCopy, runs: list[Mapping[str, list[ModuleCall]]], blocks: list[str]
) -> set[str]:
    """The kinds of blocks that are given a dict by which blocks hand each other tensors."""
    calls = [(block, call) for run in runs for block in blocks for call in run.get(block, ())]
    return {weightless.repeats.kind_of(weightless.repeats.original_name(block)) for block, call in calls if call.left}


def _together_or_not(findings: Mapping[str, BlockFinding], failures: dict[str, str], handed: set[str]) -> None:
    """Blocks that hand each other tensors must all be split, or none: a part for one is no whole for another."""
    if failed := [kind for kind in handed if kind in failures]:
        why = f"it hands tensors to a block that cannot be split ({failures[failed[0]]})"
        failures.update({kind: why for kind in handed if kind in findings and kind not in failures})


def _moved(finding: BlockFinding) -> Any:
    """A finding without the number of the block."""

    def globs(names: Mapping[str, Any]) -> dict[str, Any]:
        return {numbers_to_globs(name): value for name, value in names.items()}

    return finding.stream, finding.places, globs(finding.regions), globs(finding.attention), globs(finding.recorded)


def _finding(
    reading: ModelReading,
    weightless: WeightlessCopy,
    block: str,
    runs: list[Mapping[str, list[ModuleCall]]],
    length: int,
    alike: BlockFinding | None,
) -> BlockFinding:
    """What holds in every run: a place that is split in one must not be whole in another.

    Args:
        length: how many positions the model was given.
        alike: what was found of another block of this kind.
    """
    kernels: dict[str, str] = {}
    experts: set[str] = set()
    originals = dict(reading.model.named_modules(remove_duplicate=False))
    for name, _ in weightless.model.get_submodule(block).named_modules(prefix=block):
        original = originals.get(weightless.repeats.original_name(name))  # the trial may have made modules (BigBird)
        if original is None:
            continue
        if (kernel := attention_name(original)) is not None:
            kernels[name] = kernel
        if (call := call_of_experts(original)) is not None and call.kind != "alike":
            experts.add(name)
    recorded = recorded_modules(weightless.model)
    found: BlockFinding | None = None
    for calls in runs:
        if block not in calls:
            continue
        replay = BlockReplay(weightless, block, calls, kernels, recorded, experts, length)
        before = found or alike
        now = replay.find(None if before is None else _needing_all(before))
        found = now if found is None else _both(found, now)
    if found is None:
        raise Unsplit("it did not run in the trial")
    if found.stream not in dict(found.places.arguments):
        raise Unsplit("its first argument is not what is split")
    return found


def _needing_all(found: BlockFinding) -> dict[str, str]:
    """The children that see the whole sequence, without the block's name, and why."""
    return {name.rpartition(".")[2]: why for name, why in found.reasons.items() if name in found.regions}


def _both(one: BlockFinding, other: BlockFinding) -> BlockFinding:
    """What two runs with different inputs showed.

    Raises:
        Unsplit: they showed different things.
    """
    if one.regions.keys() != other.regions.keys() or one.recorded.keys() != other.recorded.keys():
        raise Unsplit("which of its parts need the whole sequence depends on the inputs")
    return replace(
        one,
        places=_together(one.places, other.places),
        regions={name: _together(places, other.regions[name]) for name, places in one.regions.items()},
        attention=_attention(one.attention, other.attention),
        recorded={name: _together(places, other.recorded[name]) for name, places in one.recorded.items()},
    )


def _attention(
    one: Mapping[str, AttentionFinding], other: Mapping[str, AttentionFinding]
) -> dict[str, AttentionFinding]:
    _agreeing(one, other)
    return {**one, **{name: found.and_also(one.get(name, found)) for name, found in other.items()}}


def _together(one: Places, other: Places) -> Places:
    return Places(
        tuple(sorted({**dict(one.arguments), **_agreeing(dict(one.arguments), dict(other.arguments))}.items())),
        tuple(sorted({**dict(one.results), **_agreeing(dict(one.results), dict(other.results))}.items())),
    )


def _agreeing(one: Mapping[str, Any], other: Mapping[str, Any]) -> Mapping[str, Any]:
    if any(one.get(key, value) != value for key, value in other.items()):
        raise Unsplit("where its positions are depends on the inputs")
    return other


def _runs(weightless: WeightlessCopy, inputs: Inputs, blocks: list[str]) -> Iterator[Mapping[str, list[ModuleCall]]]:
    """The calls of blocks and their children with the inputs of the trial, and with masks and positions beside them."""
    watched: dict[str, nn.Module] = {}
    for block in blocks:
        module = weightless.model.get_submodule(block)
        watched[block] = module
        watched |= {f"{block}.{child}": part for child, part in module.named_children()}
    for variant in (inputs, *_variants(inputs)):
        try:
            yield pointwise_run(weightless, variant, watched).calls
        except (Mismatch, *CODE_ERRORS):
            if variant is inputs:
                raise


def _variants(inputs: Inputs) -> Iterator[Inputs]:
    """The same with padding on either side, and with positions that start again."""
    ids = inputs.kwargs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.shape[0] < 3 or ids.shape[1] < 6:
        return
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    mask[2, -2:] = 0
    yield replace(inputs, kwargs={**inputs.kwargs, "attention_mask": mask})
    positions = torch.arange(ids.shape[1]).expand(ids.shape).clone()
    positions[:, 3:] -= 3
    yield replace(inputs, kwargs={**inputs.kwargs, "position_ids": positions})


def _spread(
    reading: ModelReading,
    weightless: WeightlessCopy,
    findings: Mapping[str, BlockFinding],
    failures: Mapping[str, str],
    method: ContextMethod,
) -> ContextPlan:
    """What was found of a kind, for every block of that kind."""
    repeats = weightless.repeats
    blocks: dict[str, SplitBlock] = {}
    whole: dict[str, str] = {}
    regions: dict[str, Places] = {}
    reasons: dict[str, str] = {}
    gathered: dict[str, int] = {}
    attention: dict[str, SplitAttention] = {}
    recorded: dict[str, Places] = {}
    for block in reading.blocks:
        kind = repeats.kind_of(block)
        finding = findings.get(kind)
        if finding is None:
            whole[block] = failures.get(kind, "it did not run in the trial")
            continue

        def here(name: str, block: str = block) -> str:
            # Copied names differ from the block's in its number alone: what is below it has kept its own.
            depth = len(block.split("."))
            return ".".join([block, *name.split(".")[depth:]])

        blocks[block] = SplitBlock(finding.stream, finding.places)
        regions |= {here(name): places for name, places in finding.regions.items()}
        reasons |= {here(name): why for name, why in finding.reasons.items() if name in finding.regions}
        gathered |= {here(name): elements for name, elements in finding.gathered.items()}
        recorded |= {here(name): places for name, places in finding.recorded.items()}
        for name, found in finding.attention.items():
            kernel = attention_name(reading.model.get_submodule(here(name)))
            assert kernel in KERNELS
            assert kernel is not None
            attention[here(name)] = method.of(here(name), kernel, found)
    owners = _owners(reading, blocks)
    layers = _layers(reading, weightless)
    return ContextPlan(
        blocks, whole, regions, reasons, gathered, attention, recorded, owners, layers, _caches(reading.model)
    )


def _owners(reading: ModelReading, blocks: Mapping[str, Any]) -> tuple[str, ...]:
    """The models of transformers that split blocks are in: they hand out what was recorded."""
    return tuple(
        name
        for name, module in reading.modules.items()
        if isinstance(module, PreTrainedModel) and any(block.startswith(f"{name}." if name else "") for block in blocks)
    )


def _layers(reading: ModelReading, weightless: WeightlessCopy) -> tuple[str, ...]:
    inside = tuple(f"{block}." for block in reading.blocks)
    linear = (
        weightless.repeats.original_name(name) for name, stub in weightless.stubs.items() if stub.kind == "linear"
    )
    norms = (name for name, module in reading.modules.items() if is_norm(module))
    names = dict.fromkeys(name for name in (*linear, *norms) if name in reading.modules and not name.startswith(inside))
    return tuple(name for name in names if not is_norm(m := reading.modules[name]) or is_pointwise_norm(m))


def _caches(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "use_cache", False))
