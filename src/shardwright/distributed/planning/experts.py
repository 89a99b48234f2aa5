"""Which modules hold experts that can be spread over ranks, and whether they fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn

from shardwright._transformers import call_of_experts
from shardwright.distributed.planning.adapters import PARAMETER
from shardwright.distributed.planning.decided import ExpertPlan, Experts
from shardwright.distributed.planning.expert_lists import spread_list
from shardwright.distributed.planning.listed_experts import ListedExperts, listed_experts
from shardwright.distributed.replay.reading import ModelReading
from shardwright.distributed.runtime.adapted import BASE
from shardwright.errors import PlanError, sizes_that_work

LAYERDROP = "layerdrop"  # the share of its layers that a module leaves out at random, in fairseq and transformers
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
    stacked = ((name, experts_of(module)) for name, module in reading.modules.items())
    found = dict(_with_adapters(reading, name, experts) for name, experts in stacked if experts is not None)
    lists = listed_experts(reading)
    found |= {listed.name: spread_list(reading, listed, ep) for listed in lists}
    _check_callers(lists, found, ep)
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


def check_all_run(reading: ModelReading, plan: ExpertPlan | None, sharers: int) -> None:
    """Ranks that exchange tokens must run the same layers with experts.

    Args:
        sharers: ranks that share a batch: these draw alike which layers are left out.

    Raises:
        PlanError: ranks with batches of their own would draw for themselves.
    """
    if plan is None or sharers % plan.ep == 0:
        return
    for name, module in reading.modules.items():
        share = module.__dict__.get(LAYERDROP)
        inside = [experts for experts in plan.modules if experts.startswith(f"{name}." if name else "")]
        if isinstance(share, float) and share > 0 and inside:
            raise PlanError(
                f"ep is {plan.ep} and {name or type(module).__name__} leaves out layers at random ({LAYERDROP} is "
                f"{share:g}), among them such with experts ({inside[0]} is the first). Each rank would leave out "
                f"others, and their exchanges of tokens would not meet. Set {LAYERDROP} to 0 (in the "
                "config its name may begin with encoder_ or decoder_), or leave ep out."
            )


def _check_callers(lists: Iterable[ListedExperts], found: Mapping[str, Experts], ep: int) -> None:
    """Code that calls the experts of two lists would have to run once more for each."""
    callers: dict[str, str] = {}
    for each in lists:
        listed = found[each.name].listed
        assert listed is not None
        if (other := callers.setdefault(listed.caller, each.name)) != each.name:
            reason = f"The code of {listed.caller} calls those of {other}, too, and the two may depend on each other"
            raise PlanError(each.why_not(ep, reason))


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


def _with_adapters(reading: ModelReading, name: str, experts: Experts) -> tuple[str, Experts]:
    """The experts, or PEFT's layer around them where their weights are adapted (by ``target_parameters``).

    Raises:
        PlanError: what is around them is none of LoRA's layers that have matrices for every expert.
    """
    adapted = set(experts.parameters)
    while name.endswith(f".{BASE}"):
        name = name.removesuffix(f".{BASE}")
        layer = reading.modules[name]
        if layer.__dict__.get(PARAMETER) not in adapted or layer.__dict__.get(COUNTS[0]) != experts.count:
            raise PlanError(
                f"{name} has adapters on its experts ({type(layer).__name__}) that are none of LoRA's with matrices "
                "for every expert, and cannot be spread with them. Leave ep out, or adapt other layers."
            )
        experts = replace(experts, parameters=tuple(f"{BASE}.{own}" for own in experts.parameters))
    return name, experts


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
