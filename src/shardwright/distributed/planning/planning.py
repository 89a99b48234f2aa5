"""From a model to a plan that is matched, checked and replayed: what everything that shards or predicts begins with."""

from __future__ import annotations

import logging
from dataclasses import replace

from torch import nn

from shardwright.distributed.plan import ParallelPlan
from shardwright.distributed.planning.complete import completed, left_replicated
from shardwright.distributed.planning.replay_check import why_not_exact
from shardwright.distributed.planning.resolve import resolve
from shardwright.distributed.planning.resolved import ResolvedPlan
from shardwright.distributed.planning.sources import CustomPlan, choose_plan
from shardwright.errors import PlanError

logger = logging.getLogger(__name__)


def plan_and_resolve(
    model: nn.Module, custom: CustomPlan | None, tp: int, *, sequence_parallel: bool = False
) -> tuple[ParallelPlan, ResolvedPlan]:
    """The plan that applies, and what it means for ``model`` on ``tp`` ranks; exact, as far as it can be replayed.

    A plan of transformers that turns out not to be exact gives way to one that is read off the model's dataflow; one
    that is, but leaves whole what could be cut, is completed from it.

    Args:
        custom: as for :func:`shardwright.distributed.planning.sources.choose_plan`.

    Raises:
        PlanError: the plan cannot be read, does not fit the model or ``tp``, or is not exact.
    """
    plan, resolved = _exact(model, custom, tp, sequence_parallel=sequence_parallel)
    if tp > 1:
        resolved.notes += left_replicated(model, resolved)
    return plan, resolved


def _exact(
    model: nn.Module, custom: CustomPlan | None, tp: int, *, sequence_parallel: bool
) -> tuple[ParallelPlan, ResolvedPlan]:
    plan = choose_plan(model, custom, tp)
    resolved = resolve(model, plan, tp, sequence_parallel=sequence_parallel)
    if tp == 1 or (custom is None and plan.tp == tp):  # one that was derived just now has been replayed
        return plan, resolved
    reason = why_not_exact(model, resolved)
    if reason is None:
        return _completed(model, plan, resolved) if plan.source == "huggingface" else (plan, resolved)
    if plan.source != "huggingface":
        raise PlanError(
            f"The plan ({plan.source}) does not compute what {type(model).__name__} computes: replayed on {tp} ranks, "
            f"{reason}. Mend the plan, or pass none and let one be read off the model's code."
        )
    from shardwright.distributed.planning.derive import derive_plan  # not needed by models whose plan is exact

    note = f"transformers' plan for this model is not exact ({reason}), so one was read off its code"
    logger.warning("%s: %s.", type(model).__name__, note)
    derived = derive_plan(model, tp=tp)
    derived = replace(derived, notes=(f"{note}.", *derived.notes))
    return derived, resolve(model, derived, tp, sequence_parallel=sequence_parallel)


def _completed(model: nn.Module, plan: ParallelPlan, resolved: ResolvedPlan) -> tuple[ParallelPlan, ResolvedPlan]:
    """A plan of transformers with what it does not mention, where all of it together is exact."""
    more = completed(model, plan, resolved)
    if more is None:
        return plan, resolved
    both = resolve(model, more, resolved.tp, sequence_parallel=resolved.sequence_parallel)
    return (plan, resolved) if why_not_exact(model, both) else (more, both)
