"""What a plan of transformers leaves whole in the blocks, cut as the model's dataflow allows.

Such a plan is often written for a model's feed-forward layers, or for one of its variants, and says nothing about the
rest. Regions of which it names no layer are decided as where there is no plan at all, with the plan in force.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from shardwright.distributed.models.blocks import numbers_to_globs
from shardwright.distributed.models.huggingface import text_model
from shardwright.distributed.plan import ParallelPlan
from shardwright.distributed.planning.derive.connections import Region, find_regions
from shardwright.distributed.planning.derive.decide import Study, decide
from shardwright.distributed.planning.derive.emit import globs, notes, region_answers
from shardwright.distributed.planning.replay_check import NotReplayable, replayable, sharding_of
from shardwright.distributed.planning.resolve import sharded_fraction
from shardwright.distributed.planning.resolved import ResolvedPlan
from shardwright.distributed.replay.reading import ModelReading

# Layers without a style that hold less than this share of the blocks' linear layers are not worth a look (routers).
WORTH_A_LOOK = 1 / 20
# Below this share of the parameters, tensor parallelism does not do what it was asked for.
LITTLE = 1 / 2
# Whole matrices that are less than this share of the blocks' need no word in the report.
WORTH_A_WORD = 1 / 20


def completed(reading: ModelReading, plan: ParallelPlan, resolved: ResolvedPlan) -> ParallelPlan | None:
    """``plan`` with the regions cut that it does not mention; None where there is nothing to add.

    Args:
        resolved: what ``plan``, which is exact, means for the model.

    Returns:
        A plan for the size of ``resolved`` only. That it is exact has been replayed, but for what is not looked into.
    """
    model = reading.model
    free = _layers_without_style(reading, resolved)
    if not free:
        return None
    recording = replayable(reading, resolved)
    if recording is None:
        return None
    weightless, inputs, record = recording.weightless, recording.inputs, recording.record
    try:
        study = Study(weightless, record, inputs, resolved.tp, sharding=sharding_of(weightless, resolved))
    except NotReplayable:
        return None
    kinds = {study.weightless.repeats.kind_of(name) for name in free}
    groups = decide(study, [region for region in find_regions(weightless, record) if _is_free(study, region, kinds)])
    chosen = [group for group in groups if group.sharding is not None]
    if not chosen:
        return None
    found = region_answers(study)
    named = {weightless.repeats.kind_of(name) for name, use in resolved.modules.items() if use.rule in plan.styles}
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    styles = {kind: style for kind, style in found.styles.items() if kind not in named}
    local = {weightless.repeats.kind_of(name) for name in resolved.attributes}
    attributes = {kind: names for kind, names in found.attributes.items() if kind not in local}
    return replace(
        plan,
        styles={**plan.styles, **globs(modules + parameters, styles, weightless.repeats)},
        local_attributes={**plan.local_attributes, **globs(modules, attributes, weightless.repeats)},
        local_arguments={**plan.local_arguments, **globs(modules, found.arguments, weightless.repeats)},
        source=f"{plan.source} + dataflow (tp={resolved.tp})",
        notes=(*plan.notes, *notes(model, study, chosen, found)),
        tp=resolved.tp,
    )


def left_replicated(reading: ModelReading, resolved: ResolvedPlan) -> list[str]:
    """A sentence about the matrices in the text model's blocks that every rank keeps whole, where they are many."""
    blocks, whole, total = _text_blocks(reading), Counter[str](), 0
    for name, module in reading.modules.items():
        if not name.startswith(blocks):
            continue
        for own, param in module._parameters.items():
            if param is None or param.ndim < 2:
                continue
            total += param.numel()
            if own in resolved.replicated.get(name, ()):
                whole[numbers_to_globs(f"{name}.{own}")] += param.numel()
    share = whole.total() / max(total, 1)
    if share < WORTH_A_WORD:
        return []
    largest = [glob for glob, _ in whole.most_common(3)]
    more = f" and {len(whole) - len(largest)} more" if len(whole) > len(largest) else ""
    names = f"{', '.join(largest)}{more}"
    return [f"{share:.0%} of the blocks' matrices are whole on every rank, since the plan does not cut {names}."]


def little_cut(reading: ModelReading, resolved: ResolvedPlan) -> list[str]:
    """A warning where tensor parallelism leaves more on every rank than it cuts."""
    share = sharded_fraction(reading, resolved)
    if share >= LITTLE:
        return []
    name, tp = type(reading.model).__name__, resolved.tp
    what = f"cuts {share:.0%} of the parameters of {name}" if share else f"cuts nothing of {name}"
    return [
        f"Tensor parallelism {what}: all {tp} ranks hold, and compute, the rest. Without it (tp=1) those ranks would "
        "work on more data instead."
    ]


def _text_blocks(reading: ModelReading) -> tuple[str, ...]:
    """The names of the text model's blocks, with a dot behind."""
    prefix = text_model(reading.model)[0]
    return tuple(f"{name}." for name in reading.blocks if name.startswith(prefix))


def _layers_without_style(reading: ModelReading, resolved: ResolvedPlan) -> list[str]:
    """The linear layers in the text model's blocks that no rule names; none where they hold too little to matter."""
    blocks, layers, left, total = _text_blocks(reading), [], 0, 0
    for name, module in reading.modules.items():
        if not name.startswith(blocks):
            continue
        use, weight = resolved.modules.get(name), module._parameters.get("weight")
        if use is None or weight is None or weight.ndim != 2:
            continue
        total += weight.numel()
        if use.style == "replicate" and use.origin != "plan":
            layers.append(name)
            left += weight.numel()
    return layers if left > WORTH_A_LOOK * total else []


def _is_free(study: Study, region: Region, kinds: set[str]) -> bool:
    """Whether no layer of a region has a style already."""
    return not region.is_stream and all(study.kind(name) in kinds for name, _ in (*region.outs, *region.ins))
