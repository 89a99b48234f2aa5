"""One case: the same model and batches in one process and on N ranks, and how far apart they end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from shardwright import api
from shardwright._torch import tree_map_only
from shardwright.distributed.apply.guards.fresh import parallelized_model
from shardwright.distributed.config import ParallelConfig
from shardwright.errors import UnsupportedError
from shardwright.verify.compare import EXACT, Difference, Report, compare
from shardwright.verify.locate import first_module_that_differs
from shardwright.verify.precision import computing_in, prepared_for
from shardwright.verify.ranks import rank_device, shared_mesh
from shardwright.verify.sharded import expert_groups, spread_fraction, tp_sharded_fraction
from shardwright.verify.stages import CrashError, ShrinkError, Stage
from shardwright.verify.step import Numbered, train

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
    report = _measure(case, torch.float32)
    if not report.exact and not report.problems:
        try:
            second = _measure(case, torch.float64)
        except (ShrinkError, CrashError, UnsupportedError) as error:
            report = replace(report, float64_failure=str(error))
        else:
            report = second if second.exact else replace(report, float64_rel_err=second.worst_error)
    inputs = "text and images" if "pixel_values" in case.batch(0) else "text"
    report = replace(report, inputs=inputs)
    if not report.exact:
        device = rank_device()
        sharded = case.parallelize(case.build().to(device), case.config, shared_mesh(case.config))
        batch = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), case.batch(0))
        found = first_module_that_differs(case.build().to(device), sharded, batch)
        report = replace(report, first_module=found, first_in="forward") if found is not None else report
    return report


def _measure(case: Case, dtype: torch.dtype) -> Report:
    mesh = shared_mesh(case.config)
    batches = _batches(case, dtype)
    run_loop = partial(train, own=case.accumulate, logits_with_labels=case.config.loss_tiles == 1)
    with Stage(ShrinkError, "The tiny model does not run in one process"):
        model = prepared_for(dtype, case.build()).to(rank_device())
        with computing_in(dtype):
            reference = run_loop(copy.deepcopy(model), batches)
    with Stage(CrashError, "Sharding the model failed"):
        groups = expert_groups(model, case.config.ep)
        model = case.parallelize(model, case.config, mesh)
    sharded, spread = tp_sharded_fraction(model), spread_fraction(model)
    with Stage(CrashError, "The model runs in one process, but fails when it is sharded"), computing_in(dtype):
        trace = run_loop(model, batches[: case.accumulate])
    report = _report(*_over_ranks(*compare(trace, reference, groups)))
    precision = str(dtype).removeprefix("torch.")
    return replace(
        report,
        plan_source=_plan_source(case, model),
        sharded_fraction=sharded,
        spread_fraction=spread,
        world_size=dist.get_world_size(),
        precision=precision,
    )


def _dp(case: Case) -> tuple[int, int]:
    """This rank's data-parallel index, and how many there are."""
    mesh, (replicate, shard) = shared_mesh(case.config), ("dp_replicate", "dp_shard")
    index = mesh.get_local_rank(replicate) * mesh[shard].size() + mesh.get_local_rank(shard)
    return index, mesh[replicate].size() * mesh[shard].size()


def _batches(case: Case, dtype: torch.dtype) -> list[Numbered]:
    """Every micro-batch of the step, this rank's first."""
    dp_rank, dp_size = _dp(case)
    first, total = dp_rank * case.accumulate, dp_size * case.accumulate
    order = [*range(first, first + case.accumulate), *range(first), *range(first + case.accumulate, total)]
    return [(index, tree_map_only(torch.Tensor, partial(_cast, dtype=dtype), case.batch(index))) for index in order]


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(rank_device(), dtype if tensor.is_floating_point() else tensor.dtype)


def _over_ranks(errors: dict[str, Difference], problems: list[str]) -> tuple[dict[str, Difference], list[str]]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (errors, problems))
    worst = {kind: Difference() for kind in errors}
    found: dict[str, None] = {}
    for theirs, their_problems in everyone:
        for kind, difference in theirs.items():
            worst[kind].take(difference.error, difference.name)
            worst[kind].over.update(difference.over)
        found.update(dict.fromkeys(their_problems))
    return worst, list(found)


def _report(errors: dict[str, Difference], problems: list[str]) -> Report:
    # Parameters come in the order in which modules run, so that the last one is the first that backward reaches.
    wrong = [(name.rpartition(".")[0] or name, error) for name, error in errors["gradient"].over.items()]
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
        expert_grad_rel_err=errors["experts"].error if "experts" in errors else None,
        router_grad_rel_err=errors["routers"].error if "routers" in errors else None,
        problems=problems,
        first_module=wrong[-1] if wrong else None,
        first_in="backward",
    )


def _plan_source(case: Case, sharded: nn.Module) -> str:
    if case.config.tp == 1:
        return "none: tp is 1"
    if case.parallelize is not api.parallelize:
        return f"custom: {case.parallelize.__name__}"
    on = parallelized_model(sharded)
    assert on is not None
    assert on.plan is not None, "tp is above 1"
    return on.plan.source
