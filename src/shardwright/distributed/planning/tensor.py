"""From a model to a plan that is matched, checked and replayed: what everything that shards or predicts begins with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container
from dataclasses import replace

from shardwright.distributed.plan import ParallelPlan
from shardwright.distributed.planning.adapters import refuse_adapters
from shardwright.distributed.planning.complete import completed, left_replicated, little_cut
from shardwright.distributed.planning.decided import ExpertPlan
from shardwright.distributed.planning.replay_check import why_not_exact
from shardwright.distributed.planning.resolve import resolve
from shardwright.distributed.planning.resolved import ResolvedPlan
from shardwright.distributed.planning.sources import NO_PLAN, Brought, CustomPlan, brought_plan, choose_plan
from shardwright.distributed.replay.reading import ModelReading
from shardwright.errors import PlanError

logger = logging.getLogger(__name__)


def plan_and_resolve(
    reading: ModelReading,
    custom: CustomPlan | None,
    tp: int,
    *,
    sequence_parallel: bool = False,
    experts: ExpertPlan | None = None,
    gathered: Container[str] = (),
) -> tuple[ParallelPlan, ResolvedPlan]:
    """The plan that applies, and what it means for the model on ``tp`` ranks; exact, as far as it can be replayed.

    A plan of transformers that turns out not to be exact gives way to one that is read off the model's dataflow; one
    that is, but leaves whole what could be cut, is completed from it.

    Args:
        custom: a plan to use instead of one that is chosen.
        sequence_parallel: split the residual stream along the sequence; torch styles in ``custom`` may ask for it too.
        experts: modules whose experts are spread over ranks, and not cut.
        gathered: children of blocks that gather more of the sequence for themselves.

    Raises:
        PlanError: the plan cannot be read, does not fit the model or ``tp``, or is not exact.
    """
    if tp > 1:
        refuse_adapters(reading.model)
    brought = None if custom is None else brought_plan(custom)
    split = sequence_parallel or (brought is not None and brought.asks_for_sequence_parallel)

    def resolved_on(plan: ParallelPlan) -> ResolvedPlan:
        return resolve(reading, plan, tp, sequence_parallel=split, experts=experts, gathered=gathered)

    plan, resolved = _exact(reading, brought, tp, resolved_on)
    if tp > 1:
        resolved.notes += left_replicated(reading, resolved)
        resolved.warnings += little_cut(reading, resolved)
    return plan, resolved


def _exact(
    reading: ModelReading, brought: Brought | None, tp: int, resolved_on: Callable[[ParallelPlan], ResolvedPlan]
) -> tuple[ParallelPlan, ResolvedPlan]:
    plan = choose_plan(reading, brought, tp)
    resolved = resolved_on(plan)
    if tp == 1 or (brought is None and plan.tp == tp):  # one that was derived just now has been replayed
        return plan, resolved
    reason = why_not_exact(reading, resolved)
    if reason is None:
        return _completed(reading, plan, resolved, resolved_on) if brought is None else (plan, resolved)
    if brought is not None:
        raise PlanError(
            f"The plan ({plan.source}) does not compute what {type(reading.model).__name__} computes: replayed on "
            f"{tp} ranks, {reason}. Mend the plan, or pass none and let one be read off the model's code."
        )
    from shardwright.distributed.planning.derive import derive_plan  # not needed by models whose plan is exact

    note = f"the plan from {plan.source} is not exact for this model ({reason}), so one was read off its code"
    logger.warning("%s: %s.", type(reading.model).__name__, note)
    derived = derive_plan(reading, tp=tp)
    derived = replace(derived, notes=(f"{note}.", *derived.notes))
    return derived, resolved_on(derived)


def _completed(
    reading: ModelReading,
    plan: ParallelPlan,
    resolved: ResolvedPlan,
    resolved_on: Callable[[ParallelPlan], ResolvedPlan],
) -> tuple[ParallelPlan, ResolvedPlan]:
    """A plan of transformers with what it does not mention, where all of it together is exact."""
    more = None if plan.source == NO_PLAN else completed(reading, plan, resolved)
    if more is None:
        return plan, resolved
    both = resolved_on(more)
    return (plan, resolved) if why_not_exact(reading, both) else (more, both)
