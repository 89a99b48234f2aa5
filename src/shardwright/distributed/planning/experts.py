"""Which modules hold experts that can be spread over ranks, and whether they fit."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from shardwright._transformers import call_of_experts
from shardwright.distributed.planning.decided import ExpertPlan, Experts
from shardwright.distributed.planning.expert_lists import spread_list
from shardwright.distributed.planning.listed_experts import listed_experts
from shardwright.distributed.replay.reading import ModelReading
from shardwright.errors import PlanError, sizes_that_work

COUNTS = ("num_experts", "moe_num_experts")  # the first on each such module of transformers, the second below DBRX's


def decide_experts(reading: ModelReading, ep: int) -> ExpertPlan | None:
    """The modules whose experts are spread over ``ep`` ranks; None for one rank.

    These hold the weights of all experts of a layer in stacked parameters, ``[experts, ...]``, and are called in one of
    the ways of :data:`shardwright._transformers.CALLS_OF_EXPERTS`.

    Raises:
        PlanError: the model has no such modules, too few experts, adapters on experts, or a list of experts.
    """
    if ep == 1:
        return None
    found = {name: experts for name, module in reading.modules.items() if (experts := experts_of(module)) is not None}
    found |= {listed.name: spread_list(reading, listed, ep) for listed in listed_experts(reading)}
    inner = tuple(f"{name}." for name in found)
    found = {name: experts for name, experts in found.items() if not name.startswith(inner)}
    if not found:
        raise PlanError(
            f"ep is {ep}, but {type(reading.model).__name__} has no experts that Shardwright can spread over ranks: no "
            "module of it holds stacked expert weights and is called in a way that is known (as those behind "
            "transformers' experts interface, use_experts_implementation). Leave ep out; tp and FSDP2 shard these "
            "parameters as any other."
        )
    for name, experts in found.items():
        _check(reading, name, experts, ep)
    return ExpertPlan(ep, found)


def experts_of(module: nn.Module) -> Experts | None:
    """What ``module`` is as a holder of stacked experts; None where it is none, or not a kind that is known."""
    count = module.__dict__.get(COUNTS[0])
    call = call_of_experts(module)
    if not isinstance(count, int) or count < 1 or call is None:
        return None
    holders = {name: part for name, part in module.named_modules() if _counts(part) == count}
    stacked = {
        f"{name}.{own}" if name else own: param
        for name, part in holders.items()
        for own, param in part._parameters.items()
        if param is not None
    }
    # A module that is called with tokens alone, and holds a matrix or a router, routes them by itself.
    alone = call.routed or (len(stacked) == len(list(module.parameters())) and _dims(stacked.values()) == {3})
    if not stacked or not alone or any(param.ndim == 0 or param.shape[0] % count for param in stacked.values()):
        return None
    return Experts(count, call.kind, call.arguments, tuple(stacked))


def _counts(module: nn.Module) -> int | None:
    """How many experts ``module`` says it holds."""
    found = (module.__dict__.get(name) for name in COUNTS)
    return next((count for count in found if isinstance(count, int)), None)


def _dims(parameters: Iterable[nn.Parameter]) -> set[int]:
    return {param.ndim for param in parameters}


def _rows(reading: ModelReading, name: str, own: str) -> int:
    return reading.modules[name].get_parameter(own).shape[0]


def _check(reading: ModelReading, name: str, experts: Experts, ep: int) -> None:
    each = -(-experts.count // ep)
    if each * (ep - 1) >= experts.count:
        raise PlanError(
            f"{name} has {experts.count} experts, and ep={ep} would leave ranks without any. "
            f"{sizes_that_work(experts.count, ep)}"
        )
    if experts.listed is not None:
        return
    if uneven := [
        own for own in experts.parameters if experts.count % ep and _rows(reading, name, own) != experts.count
    ]:
        raise PlanError(
            f"{name}.{uneven[0]} has several rows for each of {experts.count} experts, which ep={ep} does not divide. "
            f"{sizes_that_work(experts.count, ep)}"
        )
    around = reading.modules.get(name.rpartition(".")[0])
    if around is not None and around._modules.get("base_layer") is reading.modules[name]:
        raise PlanError(
            f"{name} has adapters on its experts ({type(around).__name__}). Their matrices belong to all experts, and "
            "cannot be spread with them yet. Leave ep out, or adapt other layers."
        )
