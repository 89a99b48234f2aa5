"""Which modules hold experts that can be spread over ranks, and whether they fit."""

from __future__ import annotations

from torch import nn

from shardwright._transformers import arguments_of_experts, is_experts_module
from shardwright.distributed.planning.decided import ExpertPlan, Experts
from shardwright.distributed.replay.reading import ModelReading
from shardwright.errors import PlanError, sizes_that_work

EXPERT_COUNT = "num_experts"  # what every module behind transformers' interface calls it


def decide_experts(reading: ModelReading, ep: int) -> ExpertPlan | None:
    """The modules whose experts are spread over ``ep`` ranks; None for one rank.

    These are the modules behind transformers' ``ExpertsInterface``: they hold the weights of all experts of a layer in
    parameters ``[experts, ...]``, and are called with tokens, the experts that each goes to, and weights.

    Raises:
        PlanError: the model has no such modules, or experts that ``ep`` does not divide.
    """
    if ep == 1:
        return None
    found = {name: module for name, module in reading.modules.items() if is_experts_module(module)}
    if not found:
        raise PlanError(
            f"ep is {ep}, but {type(reading.model).__name__} has no experts that Shardwright can spread over ranks: no "
            "module of it holds stacked expert weights behind transformers' experts interface "
            "(use_experts_implementation). Leave ep out; tp and FSDP2 shard these parameters as any other."
        )
    return ExpertPlan(ep, {name: _experts(name, module, ep) for name, module in found.items()})


def _experts(name: str, module: nn.Module, ep: int) -> Experts:
    count = module.__dict__.get(EXPERT_COUNT)
    shapes = {own: tuple(param.shape) for own, param in module._parameters.items() if param is not None}
    if not isinstance(count, int) or not shapes or any(shape[:1] != (count,) for shape in shapes.values()):
        raise PlanError(
            f"{name} says it holds {count!r} experts ({EXPERT_COUNT}), and its parameters have the shapes {shapes}: "
            "not all of them have a row per expert. Its experts cannot be spread over ranks; leave ep out."
        )
    if count % ep:
        raise PlanError(f"{name} has {count} experts, which ep={ep} does not divide. {sizes_that_work(count, ep)}")
    arguments = arguments_of_experts(module)
    if len(arguments) != 3:
        raise PlanError(
            f"{name} is called with ({', '.join(arguments)}). Experts that are spread over ranks are called with "
            "tokens, the experts that each goes to, and their weights; leave ep out."
        )
    return Experts(count, arguments)
