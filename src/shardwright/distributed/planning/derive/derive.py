"""``derive_plan``: a tensor-parallel plan read off the model's own code."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from shardwright.distributed.plan import ParallelPlan
from shardwright.distributed.planning.derive.connections import find_regions
from shardwright.distributed.planning.derive.decide import Study, decide, recheck
from shardwright.distributed.planning.derive.emit import make_plan
from shardwright.distributed.replay.inputs import candidate_inputs
from shardwright.distributed.replay.record import CODE_ERRORS, Mismatch
from shardwright.distributed.replay.runs import Inputs, Record, full_run
from shardwright.distributed.replay.weightless import WeightlessCopy, weightless_copy

logger = logging.getLogger(__name__)


def derive_plan(model: nn.Module, example_inputs: Any = None, *, tp: int = 2, check: bool = False) -> ParallelPlan:
    """The tensor-parallel plan that ``model``'s own code allows.

    The model is copied without its weights and run once in full and once as every rank of a sharded model; nothing of
    the model's size is allocated, and ``model``, which may be on meta, is not changed.

    Args:
        model: any module.
        example_inputs: what to call it with: a tensor, a tuple of arguments or a dict of keyword arguments, whose
            values do not matter (meta tensors will do). None: made from a transformers model's config, or guessed from
            the first layer.
        tp: the number of tensor-parallel ranks that the plan is for.
        check: replay every rank once more, with other values, and make whole what does not hold, region by region.

    Returns:
        A plan whose styles are exact. Where nothing can be said about the model, a plan without styles whose note says
        why.
    """
    attempt = _first_run(model, example_inputs)
    if isinstance(attempt, str):
        return ParallelPlan({}, source=f"dataflow (tp={tp})", notes=(attempt,))
    weightless, inputs, record = attempt
    study = Study(weightless, record, inputs, tp)
    groups = decide(study, find_regions(weightless, record))
    if check:
        recheck(study, groups, seed=1)
    return replace(make_plan(model, study, groups), tp=tp)


def _first_run(model: nn.Module, example_inputs: Any) -> tuple[WeightlessCopy, Inputs, Record] | str:
    """Find inputs that the model runs with: on a copy with two blocks of each kind, or, failing that, with all.

    Some models change their weights for inference (RWKV) or keep back part of their code in it: they run in training
    mode, with nothing dropped.
    """
    reason = "no tensor parallelism: this model's inputs could not be guessed; pass example_inputs to derive_plan."
    for whole, training in ((False, False), (True, False), (False, True), (True, True)):
        weightless = weightless_copy(model, whole=whole)
        if training:
            _train_without_dropout(weightless.model)
        for inputs in candidate_inputs(model, example_inputs):
            try:
                return weightless, inputs, full_run(weightless, inputs)
            except (Mismatch, *CODE_ERRORS) as error:
                message = f"{type(error).__name__}: {error}".partition("\n")[0]
                reason = f"no tensor parallelism: {type(model).__name__} did not run ({message})."
                logger.debug("derive_plan: %s", reason)
    return reason


def _train_without_dropout(model: nn.Module) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.eval()
