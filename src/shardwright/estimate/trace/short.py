"""A short model on meta, and its part of a decided plan: two blocks of each kind stand for all that are alike."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from shardwright.distributed.models.ties import Tie
from shardwright.distributed.planning.context_plan import ContextPlan
from shardwright.distributed.planning.decided import DecidedPlan, ExpertPlan
from shardwright.distributed.planning.resolved import RegionUse, ResolvedPlan, StyleUse
from shardwright.distributed.replay.reading import ModelReading
from shardwright.distributed.replay.repeats import Repeats, find_repeats

KEPT = 2  # of a kind: the first of a list has no gradient to hand on, the last stands for the rest


@dataclass
class Short:
    """The short model.

    Attributes:
        model: on meta; parameters are in the dtype that a step computes in.
        repeats: which of its blocks stand for which of the original.
        decided: the plan, for the blocks that are left.
        stands_for: name of every block of the original -> the one in the short model that stands for it.
    """

    model: nn.Module
    repeats: Repeats
    decided: DecidedPlan
    stands_for: dict[str, str]


def shorten(reading: ModelReading, decided: DecidedPlan, dtype: torch.dtype | None) -> Short:
    """A copy of the model with two blocks of each kind.

    Blocks are of one kind where they are alike and alike is decided about them.

    Args:
        dtype: that parameters are computed in; None: their own.
    """
    repeats = find_repeats(reading.model, keep=None)
    recomputed = set(decided.recomputed)
    lists = {block.rpartition(".")[0] for block in reading.blocks}
    for name, repeated in repeats.lists.items():
        if name not in lists or type(reading.modules[name]) is not nn.ModuleList:
            continue
        alike = [(kind, _is_in(f"{name}.{i}", recomputed)) for i, kind in enumerate(repeated.kinds)]
        numbers = {each: number for number, each in enumerate(dict.fromkeys(alike))}
        repeated.kinds = [numbers[each] for each in alike]
        seen = repeated.kinds
        repeated.kept = [i for i, kind in enumerate(seen) if seen[:i].count(kind) < KEPT]
    model = _on_meta(reading.model, repeats, dtype)
    repeats.truncate(model)
    names = {repeats.original_name(name): name for name, _ in model.named_modules(remove_duplicate=False)}
    part = _Part(names)
    return Short(model, repeats, part.decided(decided), {name: repeats.stand_in(name) for name in reading.blocks})


def _is_in(block: str, names: set[str]) -> bool:
    return any(f"{name}.".startswith(f"{block}.") for name in names)


def _on_meta(model: nn.Module, repeats: Repeats, dtype: torch.dtype | None) -> nn.Module:
    memo: dict[int, Any] = {id(block): nn.Identity() for block in repeats.dropped(model)}
    for module in model.modules():
        for param in module._parameters.values():
            if param is not None and id(param) not in memo:
                kept = dtype if dtype is not None and param.is_floating_point() else param.dtype
                empty = torch.empty(param.shape, dtype=kept, device="meta")
                memo[id(param)] = nn.Parameter(empty, requires_grad=param.requires_grad)
        for buffer in module._buffers.values():
            if buffer is not None:
                memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo).train()


class _Part:
    """The part of a plan that speaks of some modules, under other names.

    Args:
        names: original name of a module that is left -> its name now.
    """

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def decided(self, decided: DecidedPlan) -> DecidedPlan:
        tiles = replace(decided.tiles, mlps=self.kept(decided.tiles.mlps))
        return replace(
            decided,
            tensor=None if decided.tensor is None else self.resolved(decided.tensor),
            data=None,
            context=None if decided.context is None else self.context(decided.context),
            experts=None if decided.experts is None else self.experts(decided.experts),
            blocks=self.kept(decided.blocks),
            recomputed=self.kept(decided.recomputed),
            compiled=self.kept(decided.compiled),
            summing=self.kept(decided.summing),
            tiles=tiles,
        )

    def kept(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(self.names[name] for name in names if name in self.names)

    def by_name(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {self.names[name]: value for name, value in values.items() if name in self.names}

    def resolved(self, plan: ResolvedPlan) -> ResolvedPlan:
        bare = {(self.names[owner], own): use for (owner, own), use in plan.parameters.items() if owner in self.names}
        return replace(
            plan,
            modules={name: self.use(use) for name, use in self.by_name(plan.modules).items()},
            parameters=bare,
            regions={name: self.region(use) for name, use in self.by_name(plan.regions).items()},
            blocks=list(self.kept(plan.blocks)),
            whole_blocks=list(self.kept(plan.whole_blocks)),
            replicated=self.by_name(plan.replicated),
            summed=self.by_name(plan.summed),
            attributes=self.by_name(plan.attributes),
            arguments=self.by_name(plan.arguments),
            widths=self.by_name(plan.widths),
            ties=[tie for tie in map(self.tie, plan.ties) if len(tie.places) > 1],
        )

    def experts(self, plan: ExpertPlan) -> ExpertPlan:
        return replace(plan, modules=self.by_name(plan.modules))

    def context(self, plan: ContextPlan) -> ContextPlan:
        return replace(
            plan,
            blocks=self.by_name(plan.blocks),
            whole=self.by_name(plan.whole),
            regions=self.by_name(plan.regions),
            reasons=self.by_name(plan.reasons),
            attention=self.by_name(plan.attention),
            recorded=self.by_name(plan.recorded),
            owners=self.kept(plan.owners),
            layers=self.kept(plan.layers),
        )

    def use(self, use: StyleUse) -> StyleUse:
        return use if use.region is None else replace(use, region=self.names[use.region])

    def region(self, use: RegionUse) -> RegionUse:
        return use if use.block is None else replace(use, block=self.names[use.block])

    def tie(self, tie: Tie) -> Tie:
        return Tie(tuple((self.names[module], own) for module, own in tie.places if module in self.names))
