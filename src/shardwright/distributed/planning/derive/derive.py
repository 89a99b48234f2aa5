"""``derive_plan``: a tensor-parallel plan read off the model's own code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from shardwright.distributed.plan import ParallelPlan
from shardwright.distributed.planning.derive.connections import find_regions
from shardwright.distributed.planning.derive.decide import Study, decide, recheck
from shardwright.distributed.planning.derive.emit import make_plan
from shardwright.distributed.replay.reading import ModelReading


def derive_plan(
    model: nn.Module | ModelReading, example_inputs: Any = None, *, tp: int = 2, check: bool = False
) -> ParallelPlan:
    """The tensor-parallel plan that ``model``'s own code allows.

    The model is copied without its weights and run once in full and once as every rank of a sharded model; nothing of
    the model's size is allocated, and ``model``, which may be on meta, is not changed.

    Args:
        model: any module, or a reading of it.
        example_inputs: what to call it with: a tensor, a tuple of arguments or a dict of keyword arguments, whose
            values do not matter (meta tensors will do). None: made from a transformers model's config, or guessed from
            the first layer.
        tp: the number of tensor-parallel ranks that the plan is for.
        check: replay every rank once more, with other values, and make whole what does not hold, region by region.

    Returns:
        A plan whose styles are exact. Where nothing can be said about the model, a plan without styles whose note says
        why.
    """
    reading = model if isinstance(model, ModelReading) else ModelReading(model, example_inputs)
    recording = reading.recording()
    if recording is None or recording.record.backward_failure:
        reason = f"its backward did not run ({recording.record.backward_failure})" if recording else reading.why_not()
        note = f"no tensor parallelism: {reason}. Pass example_inputs to derive_plan."
        return ParallelPlan({}, source=f"dataflow (tp={tp})", notes=(note,))
    study = Study(recording.weightless, recording.record, recording.inputs, tp)
    groups = decide(study, find_regions(recording.weightless, recording.record))
    if check:
        recheck(study, groups, seed=1)
    return replace(make_plan(reading.model, study, groups), tp=tp)
