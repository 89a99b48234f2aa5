"""FSDP2's units: which modules are gathered and freed as one, when, and how far ahead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from shardwright.distributed.config import ParallelConfig
from shardwright.distributed.models.blocks import by_list, owns_parameters, shared_parts
from shardwright.distributed.planning.decided import ROOT, DataPlan, ExpertPlan, Unit, innermost
from shardwright.distributed.planning.embedding_and_head import embedding_and_head_names
from shardwright.distributed.planning.layout import ParameterLayout
from shardwright.distributed.precision import Precision
from shardwright.distributed.replay.reading import ModelReading
from shardwright.distributed.runtime.adapted import BASE
from shardwright.errors import PlanError


def wants_fsdp2(config: ParallelConfig, ranks: int) -> bool:
    """Whether there is anything for FSDP2 to do: to shard, or to cast.

    Args:
        ranks: over which parameters are sharded or replicated, context-parallel ones included. Experts on ranks of
            their own may be sharded over tensor-parallel ranks, too.
    """
    return config.engine == "fsdp2" and (ranks > 1 or config.ep > 1 or config.precision != Precision())


def decide_data(
    reading: ModelReading,
    blocks: Sequence[str],
    layouts: Mapping[int, ParameterLayout],
    config: ParallelConfig,
    *,
    compute_dtype: torch.dtype | None,
    experts: ExpertPlan | None = None,
    root: bool = True,
) -> DataPlan:
    """The units of a model.

    Args:
        blocks: the modules that can be units.
        layouts: by the identity of the parameter.
        compute_dtype: in which parameters are gathered; None where each is in its own.
        experts: modules that are units of their own, because their parameters lie on other ranks.
        root: whether the model itself is a unit, with every parameter that no other has.

    Raises:
        PlanError: a unit would have trained parameters of several dtypes, or ``shard_ends`` does not fit the model.
    """
    model, mode = reading.model, config.reshard_after_forward
    plain = [name for name in blocks if not isinstance(model.get_submodule(name), FSDPModule)]
    shared = shared_parts(model, plain)
    in_shared = {name for parts in shared for name in parts}
    sizes = {name: _gathered_bytes(model.get_submodule(name), layouts, compute_dtype) for name in plain}
    kept = kept_gathered(by_list(plain, reading.blocks), sizes, mode, config.keep_gathered_gib * 2**30)
    ends = embedding_and_head_names(reading) if config.shard_ends else []
    kept_ends = set(ends) if mode == "never" else set(ends[-1:]) if mode == "default" else set()
    units = [
        *((tuple(parts), mode != "never") for parts in shared),
        *(((name,), name not in kept) for name in plain if name not in in_shared),
        *(((name,), name not in kept_ends) for name in ends),
        *([((ROOT,), False)] if root else []),
    ]
    taken: set[int] = {id(part) for part in model.modules() if isinstance(part, FSDPModule)}
    made = list(_expert_units(reading, experts, kept, mode))
    taken |= {id(model.get_submodule(name)) for unit in made for name in unit.modules}
    for modules, reshard in units:
        first = model.get_submodule(modules[0])
        apart = _parts_of_other_dtype(reading, first, taken)
        taken |= {id(model.get_submodule(name)) for name in (*apart, *modules)}
        made.append(Unit(modules, reshard, tuple(apart)))
    lists = by_list(plain, reading.blocks)
    return DataPlan(tuple(made), _prefetch(lists, config.prefetch), _as_they_run(reading, lists))


def _as_they_run(reading: ModelReading, lists: Iterable[str]) -> tuple[str, ...]:
    """``lists`` of blocks in the order in which they run, without those that the recorded run does not come to."""
    recording = reading.recording()
    if recording is None:
        return ()
    original = recording.weightless.repeats.original_name
    called = [original(name) for name in recording.record.calls.counts]
    places = {each: next((n for n, name in enumerate(called) if name.startswith(f"{each}.")), None) for each in lists}
    found = {each: place for each, place in places.items() if place is not None}
    return tuple(sorted(found, key=lambda each: found[each]))


def _expert_units(reading: ModelReading, experts: ExpertPlan | None, kept: set[str], mode: str) -> Iterator[Unit]:
    """A unit for each module that holds experts, and for whatever stands in it and has parameters of its own.

    Experts stay gathered for as long as the block around them.
    """
    for name, own in experts.modules.items() if experts is not None else ():
        reshard = mode == "always" or (mode == "default" and innermost(name, kept) == ROOT)
        if own.listed is not None:
            listed = tuple(f"{name}.{expert}" for expert in own.listed.loop.experts)
            yield Unit(listed, reshard, experts=True, gathered_around=True)
            continue
        spread = {f"{name}.{parameter}".rpartition(".")[0] for parameter in own.parameters}
        adapted, holder = False, name
        while BASE in reading.modules[holder]._modules:  # adapters are parameters of the block
            adapted, holder = True, f"{holder}.{BASE}"
        for child, part in reading.modules[holder].named_children():
            if f"{holder}.{child}" not in spread and any(True for _ in part.parameters()):
                yield Unit((f"{holder}.{child}",), reshard)
        yield Unit((holder,), reshard, experts=True, gathered_around=adapted)


def kept_gathered(lists: Mapping[str, list[str]], sizes: Mapping[str, int], policy: str, budget: float) -> set[str]:
    """The units whose parameters stay gathered between forward and backward.

    The last ones come first: backward needs them soonest, so they take memory for the shortest time.

    Args:
        lists: the units of every list of blocks.
        sizes: unit -> bytes of its gathered parameters, in the model's order.
        policy: ``ParallelConfig.reshard_after_forward``.
        budget: bytes that the kept units may take together; the last of a list stays in any case.
    """
    if policy != "default":
        return set(sizes) if policy == "never" else set()
    kept = {names[-1] for names in lists.values()}
    left = budget - sum(sizes[name] for name in kept)
    for name in reversed(list(sizes)):
        if name not in kept:
            left -= sizes[name]
            if left < 0:
                break
            kept.add(name)
    return kept


def _gathered_bytes(
    module: nn.Module, layouts: Mapping[int, ParameterLayout], compute_dtype: torch.dtype | None
) -> int:
    """Bytes that the module's parameters take on a rank when FSDP2 has gathered them."""
    return sum(
        layouts[id(param)].gathered_numel * (compute_dtype or param.dtype).itemsize for param in module.parameters()
    )


def _prefetch(lists: Mapping[str, list[str]], depth: int) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Every block gathers the ``depth`` blocks behind it in forward, before it in backward."""
    if depth == 1:
        return {}
    return {
        name: (tuple(names[at + 1 : at + 1 + depth]), tuple(names[max(at - depth, 0) : at][::-1]))
        for names in lists.values()
        for at, name in enumerate(names)
    }


def _parts_of_other_dtype(reading: ModelReading, module: nn.Module, taken: set[int]) -> list[str]:
    """Modules to shard as units of their own, because FSDP2 wants one dtype among a unit's trained parameters.

    Args:
        taken: ids of the modules that are units already, with all below them.
    """
    own = [part for part in _untaken(module, taken) if owns_parameters(part)]
    trained = {
        id(param): param
        for part in own
        for param in part._parameters.values()
        if param is not None and param.requires_grad
    }
    counts: Counter[torch.dtype] = Counter()
    for param in trained.values():
        counts[param.dtype] += param.numel()
    if len(counts) < 2:
        return []
    main = counts.most_common(1)[0][0]
    names = {id(part): name for name, part in reading.modules.items()}
    parts: list[str] = []
    for part in own:
        dtypes = {param.dtype for param in part._parameters.values() if param is not None and param.requires_grad}
        if len(dtypes) > 1 or (dtypes - {main} and part is module):
            raise PlanError(
                f"{type(part).__name__} owns trained parameters of several dtypes ({_names(dtypes | {main})}), which "
                "FSDP2 cannot put into one unit. Convert the model to one dtype, or freeze those parameters."
            )
        if dtypes - {main}:
            parts.append(names[id(part)])
    return parts


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _untaken(module: nn.Module, taken: set[int]) -> list[nn.Module]:
    """``module`` and what is below it, down to and without the modules that are taken."""
    found = [module]
    for child in module.children():
        if id(child) not in taken:
            found += _untaken(child, taken)
    return found
