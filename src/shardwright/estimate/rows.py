"""One row per pattern of modules: which style, why, and how much of it is cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from shardwright.distributed.config import ParallelConfig
from shardwright.distributed.models.blocks import block_names, numbers_to_globs
from shardwright.distributed.plan import ParallelPlan, match_names
from shardwright.distributed.planning.layout import ParameterLayout
from shardwright.distributed.planning.resolved import ResolvedPlan, StyleUse
from shardwright.estimate.memory import Memory, memory_per_rank


@dataclass(frozen=True)
class Row:
    """Modules (or bare parameters) whose names differ in numbers only and that have the same style for the same reason.

    Attributes:
        pattern: their names, numbers replaced by ``*``.
        block: the glob of the blocks they are in; ``""`` outside.
        style: the style that is applied.
        source: where the style comes from: the plan's source, or an :data:`.Origin` that is not the plan.
        rule: the plan's glob, or the reason.
        count: how many modules.
        parameters: in all of them; a tied parameter counts where it comes first.
        cut: how many of these tensor parallelism cuts.
        memory: bytes per rank of all of them.
    """

    pattern: str
    block: str
    style: str
    source: str
    rule: str
    count: int = 0
    parameters: int = 0
    cut: int = 0
    memory: Memory = field(default_factory=Memory)

    @property
    def share(self) -> float | None:
        """The share of the parameters that is cut, between 0 and 1; None where there are none."""
        return self.cut / self.parameters if self.parameters else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "pattern": self.pattern,
            "count": self.count,
            "style": self.style,
            "source": self.source,
            "rule": self.rule,
            "parameters": self.parameters,
            "cut_share": self.share,
            "bytes_per_rank": self.memory.to_dict(),
        }


def module_rows(
    model: nn.Module,
    plan: ParallelPlan,
    resolved: ResolvedPlan,
    layouts: Iterable[ParameterLayout],
    config: ParallelConfig,
) -> list[Row]:
    """The rows of a model, in its order. ``config`` has its precision settled."""
    rules = _rules_of_bare_parameters(model, plan, resolved)
    of_module: dict[str, list[ParameterLayout]] = {}
    for layout in layouts:
        key = layout.name if (layout.module, layout.own) in resolved.parameters else layout.module
        of_module.setdefault(key, []).append(layout)
    blocks = set(block_names(model))
    rows: dict[Row, list[list[ParameterLayout]]] = {}
    for name, style, source, rule in _uses(model, plan, resolved, rules):
        row = Row(numbers_to_globs(name), numbers_to_globs(_block_of(name, blocks)), style, source, rule)
        rows.setdefault(row, []).append(of_module.get(name, []))
    return [_filled(row, found, config) for row, found in rows.items()]


def _filled(row: Row, found: list[list[ParameterLayout]], config: ParallelConfig) -> Row:
    layouts = [layout for each in found for layout in each]
    return replace(
        row,
        count=len(found),
        parameters=sum(layout.numel for layout in layouts),
        cut=sum(layout.numel for layout in layouts if layout.cut),
        memory=memory_per_rank(layouts, config),
    )


def _uses(
    model: nn.Module, plan: ParallelPlan, resolved: ResolvedPlan, rules: dict[tuple[str, str], str]
) -> Iterator[tuple[str, str, str, str]]:
    """(name, style, source, rule) of every module and bare parameter that has one, in the model's order."""
    for name, module in model.named_modules():
        use = resolved.modules.get(name)
        if use is not None:
            yield name, use.style, *_reason(use, plan)
        for own in module._parameters:
            if (style := resolved.parameters.get((name, own))) is not None:
                yield f"{name}.{own}" if name else own, style, plan.source, rules[name, own]


def _reason(use: StyleUse, plan: ParallelPlan) -> tuple[str, str]:
    if use.origin == "plan":
        return plan.source, use.rule
    return use.origin, use.rule or "replicated on every rank, because no rule names it"


def _rules_of_bare_parameters(
    model: nn.Module, plan: ParallelPlan, resolved: ResolvedPlan
) -> dict[tuple[str, str], str]:
    """The rule of every bare parameter: the last of the plan's globs that matches."""
    names = {f"{name}.{own}" if name else own: (name, own) for name, own in resolved.parameters}
    return {names[name]: glob for glob in plan.styles for name in match_names(glob, names)}


def _block_of(name: str, blocks: set[str]) -> str:
    while name and name not in blocks:
        name = name.rpartition(".")[0]
    return name
