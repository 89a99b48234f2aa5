"""How far a sharded step is from the same step in one process."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from shardwright.verify.step import Trace

EXACT = 1e-5
# A gradient is measured against the largest element among the gradients of its module, and against this share of the
# median of all modules' at least. Some gradients are zero in exact arithmetic (a key bias under softmax) and hold only
# rounding in both runs; what was summed to get there has the size of the other gradients of the module.
FLOOR = 1e-3


@dataclass
class Difference:
    """The largest relative error of one kind of quantity and where it is; ``over``: every one that is not exact."""

    error: float = 0.0
    name: str = ""
    over: dict[str, float] = field(default_factory=dict)

    def take(self, error: float, name: str) -> None:
        if not error < EXACT:
            self.over[name] = error
        if not error <= self.error:  # NaN counts as worse than everything
            self.error, self.name = (math.inf if math.isnan(error) else error), name


@dataclass
class Report:
    """What :func:`shardwright.verify.verify` found. Errors are relative to the largest element of the reference.

    Attributes:
        exact: every error below is smaller than 1e-5, and both models have the same parameters.
        loss_diff: largest absolute difference of the loss of a micro-batch of the first step.
        logits_rel_err: of these forwards and of evaluations before, in and after the first step; of the losses of the
            evaluations where a model returns no logits.
        max_grad_rel_err: over the gradients of all parameters in the first step; ``worst_parameter`` has it.
        grad_norm_rel_err: of the norm that stock ``clip_grad_norm_`` returns.
        parameter_rel_err: of the parameters after two AdamW steps; ``worst_updated_parameter`` has it.
        sharded_fraction: share of the elements of the text model's matrices that tensor parallelism split.
        spread_fraction: share of the elements of all parameters that are experts on ranks of their own.
        expert_grad_rel_err: over the gradients of these; None where there are none.
        router_grad_rel_err: over the gradients of what chooses among them.
        plan_source: where the tensor-parallel plan came from.
        world_size: number of ranks.
        inputs: ``text``, or ``text and images``; a vision tower takes part only in the latter.
        precision: of the run that the numbers are from. A model that is not exact in float32 is run again in float64,
            with the same bound: if it is exact there, the differences were float32 rounding that the model amplifies.
        float64_rel_err: the largest error of the second run, where there was one and it was not exact either.
        float64_failure: why there was no second run where there should have been one.
        problems: differences that are not numbers, such as a tie that broke.
        first_module: the first module, in order of execution, whose output differs, and its relative error; where all
            outputs agree, the first module in order of backward whose gradients differ.
        first_in: ``forward`` or ``backward``, for ``first_module``.
    """

    exact: bool
    loss_diff: float
    logits_rel_err: float
    max_grad_rel_err: float
    worst_parameter: str
    sharded_fraction: float
    plan_source: str
    grad_norm_rel_err: float = 0.0
    parameter_rel_err: float = 0.0
    worst_updated_parameter: str = ""
    spread_fraction: float = 0.0
    expert_grad_rel_err: float | None = None
    router_grad_rel_err: float | None = None
    world_size: int = 1
    inputs: str = "text"
    precision: str = "float32"
    float64_rel_err: float | None = None
    float64_failure: str = ""
    problems: list[str] = field(default_factory=list)
    first_module: tuple[str, float] | None = None
    first_in: str = "forward"

    @property
    def worst_error(self) -> float:
        """The largest relative error of all kinds."""
        return max(self.logits_rel_err, self.max_grad_rel_err, self.grad_norm_rel_err, self.parameter_rel_err)

    def summary(self) -> str:
        """One sentence on what differs."""
        measured = {
            "loss (absolute)": self.loss_diff,
            "logits": self.logits_rel_err,
            f"gradient of {self.worst_parameter}": self.max_grad_rel_err,
            "gradient norm": self.grad_norm_rel_err,
            f"{self.worst_updated_parameter} after the step": self.parameter_rel_err,
        }
        parts = [f"{what} off by {error:.1e}" for what, error in measured.items() if not error < EXACT]
        if self.float64_rel_err is not None:
            parts.append(f"{self.float64_rel_err:.1e} in float64")
        if self.float64_failure:
            parts.append("no second run in float64")
        if self.first_module is not None:
            name, error = self.first_module
            parts.append(f"first to differ in {self.first_in}: {name} ({error:.1e})")
        return "; ".join([*self.problems, *parts]) or "exact"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, which knows no infinity: an error that is one becomes null."""
        data = asdict(self)
        infinite = [name for name, value in data.items() if isinstance(value, float) and math.isinf(value)]
        return data | dict.fromkeys(infinite)


def relative_error(value: torch.Tensor, reference: torch.Tensor, floor: float = 0.0) -> float:
    """``max|value - reference| / max(max|reference|, floor)``; infinite where the shapes differ."""
    if value.shape != reference.shape:
        return math.inf
    if reference.numel() == 0:
        return 0.0
    difference = (value.double() - reference.double()).abs().max().item()
    scale = max(reference.double().abs().max().item(), floor)
    return difference / scale if scale else math.inf if difference else 0.0


def compare(
    trace: Trace, reference: Trace, groups: Mapping[str, Collection[str]] | None = None
) -> tuple[dict[str, Difference], list[str]]:
    """Errors by kind (``loss``, ``loss_diff``, ``logits``, ``gradient``, ``norm``, ``parameter``), and problems.

    Args:
        groups: names of parameters whose gradients are a kind of their own besides, by the name of the kind.
    """
    groups = groups or {}
    kinds = ("loss", "loss_diff", "logits", "gradient", "norm", "parameter", *groups)
    errors = {kind: Difference() for kind in kinds}
    for loss, expected in zip(trace.losses, reference.losses, strict=True):
        errors["loss"].take(relative_error(loss, expected), "loss")
        errors["loss_diff"].take((loss - expected).abs().item(), "loss")
    problems = _names(trace.gradients, reference.gradients)
    if len(trace.logits) != len(reference.logits):
        problems.append(f"{len(trace.logits)} logits where one process has {len(reference.logits)}")
    for logits, expected in zip(trace.logits, reference.logits, strict=False):
        errors["logits"].take(relative_error(logits, expected), "logits")
    scales = gradient_scales(reference.gradients)
    for name, expected_gradient in reference.gradients.items():
        gradient = trace.gradients.get(name)
        if expected_gradient is None:
            expected_gradient = torch.zeros(()) if gradient is None else torch.zeros_like(gradient)
        if gradient is None:
            gradient = torch.zeros_like(expected_gradient)
        for kind in ("gradient", *(kind for kind, names in groups.items() if name in names)):
            errors[kind].take(relative_error(gradient, expected_gradient, scales[name]), name)
    errors["norm"].take(relative_error(trace.norm, reference.norm), "total norm")
    for name, parameter in reference.parameters.items():
        if name in trace.parameters:
            errors["parameter"].take(relative_error(trace.parameters[name], parameter), name)
    return errors, problems


def gradient_scales(gradients: Mapping[str, torch.Tensor | None]) -> dict[str, float]:
    """What the error of each gradient is measured against, at least."""
    sizes: dict[str, float] = {}
    for name, gradient in gradients.items():
        size = 0.0 if gradient is None or gradient.numel() == 0 else gradient.abs().max().item()
        module = name.rpartition(".")[0]
        sizes[module] = max(size, sizes.get(module, 0.0))
    positive = sorted(size for size in sizes.values() if size > 0)
    floor = FLOOR * positive[len(positive) // 2] if positive else 0.0
    return {name: max(sizes[name.rpartition(".")[0]], floor) for name in gradients}


def _names(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    problems = []
    if missing := sorted(set(there) - set(here)):
        problems.append(f"parameters that are gone: {', '.join(missing)}")
    if extra := sorted(set(here) - set(there)):
        problems.append(f"parameters that were not there (a tie that broke?): {', '.join(extra)}")
    return problems
