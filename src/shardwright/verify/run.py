"""One case: the same model and batches in one process and on N ranks, and how far apart they end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from shardwright import api
from shardwright.distributed.config import ParallelConfig
from shardwright.distributed.models.sources import choose_plan
from shardwright.verify.compare import EXACT, Difference, Report, compare
from shardwright.verify.locate import first_module_that_differs
from shardwright.verify.ranks import shared_mesh
from shardwright.verify.stages import CrashError, ShrinkError, Stage
from shardwright.verify.step import tp_sharded_fraction, train_step

Batch = Mapping[str, Any]
Parallelize = Callable[[nn.Module, ParallelConfig, DeviceMesh], nn.Module]


@dataclass(frozen=True)
class Case:
    """What to run; everything in it is pickled to the ranks.

    Attributes:
        build: makes the model, on CPU, with the same weights every time it is called.
        batch: makes the keyword arguments of one forward from the number of the micro-batch.
        config: how to spread the model.
        accumulate: micro-batches that each data-parallel rank accumulates before the optimizer's step.
        parallelize: what is put to the test.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    config: ParallelConfig
    accumulate: int = 1
    parallelize: Parallelize = api.parallelize


def run_case(case: Case) -> Report:
    """Run ``case`` on the calling rank, against one process; called on every rank of the process group at once.

    Every rank runs the reference for itself and compares its own copy of everything, so that ranks that disagree
    are found. The report has the worst over the ranks.
    """
    mesh = shared_mesh(case.config)
    dp_rank = mesh.get_local_rank("dp_replicate") * mesh["dp_shard"].size() + mesh.get_local_rank("dp_shard")
    dp_size = mesh["dp_replicate"].size() * mesh["dp_shard"].size()
    batches = [case.batch(index) for index in range(dp_size * case.accumulate)]
    mine = slice(dp_rank * case.accumulate, (dp_rank + 1) * case.accumulate)

    with Stage(ShrinkError, "The tiny model does not run in one process"):
        model = case.build()
        reference_model = copy.deepcopy(model)
        ordered = batches[mine] + batches[: mine.start] + batches[mine.stop :]
        reference = train_step(reference_model, ordered, len(batches))
    reference.losses = reference.losses[: case.accumulate]
    reference.logits = reference.logits[: case.accumulate] + reference.logits[len(batches) :]
    with Stage(CrashError, "Sharding the model failed"):
        model = case.parallelize(model, case.config, mesh)
    fraction = tp_sharded_fraction(model.parameters())
    with Stage(CrashError, "The model runs in one process, but fails when it is sharded"):
        trace = train_step(model, batches[mine], case.accumulate)
    errors, problems = _over_ranks(*compare(trace, reference))
    report = _report(errors, problems)
    source = _plan_source(case)
    report = replace(report, sharded_fraction=fraction, plan_source=source, world_size=dist.get_world_size())
    if not report.exact:
        report.first_module = first_module_that_differs(
            case.build(), case.parallelize(case.build(), case.config, mesh), batches[mine.start]
        )
    return report


def _over_ranks(errors: dict[str, Difference], problems: list[str]) -> tuple[dict[str, Difference], list[str]]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (errors, problems))
    worst = {kind: Difference() for kind in errors}
    found: dict[str, None] = {}
    for theirs, their_problems in everyone:
        for kind, difference in theirs.items():
            worst[kind].take(difference.error, difference.name)
        found.update(dict.fromkeys(their_problems))
    return worst, list(found)


def _report(errors: dict[str, Difference], problems: list[str]) -> Report:
    measured = [difference.error for kind, difference in errors.items() if kind != "loss_diff"]
    return Report(
        exact=not problems and all(error < EXACT for error in measured),
        loss_diff=errors["loss_diff"].error,
        logits_rel_err=errors["logits"].error,
        max_grad_rel_err=errors["gradient"].error,
        worst_parameter=errors["gradient"].name,
        sharded_fraction=0.0,
        plan_source="",
        grad_norm_rel_err=errors["norm"].error,
        parameter_rel_err=errors["parameter"].error,
        worst_updated_parameter=errors["parameter"].name,
        problems=problems,
    )


def _plan_source(case: Case) -> str:
    if case.config.tp == 1:
        return "none: tp is 1"
    if case.parallelize is not api.parallelize:
        return f"custom: {case.parallelize.__name__}"
    source = [choose_plan(case.build(), case.config.plan).source] if dist.get_rank() == 0 else [None]
    dist.broadcast_object_list(source)
    return str(source[0])
