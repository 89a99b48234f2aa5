"""Experts in batched parameters that a plan leaves whole (one that was read off the dataflow, or one of transformers'
that is silent about them): cut as transformers says.

What such experts do with their parameters is no linear layer, so the dataflow does not see through it. transformers'
configs say for each such module how tensor parallelism cuts it (a slice of every expert), or how expert parallelism
does (whole experts on each rank). Either way the module takes whole inputs and returns a whole sum, so that the rest of
the plan does not depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from shardwright._transformers import own_tp_plan
from shardwright.distributed.models.blocks import block_names
from shardwright.distributed.models.huggingface import pretrained, text_config, text_model
from shardwright.distributed.plan import ParallelPlan, match_names
from shardwright.distributed.runtime.adapted import base_layer
from shardwright.distributed.styles import STYLES


def _is_for_experts(style: str) -> bool:
    cls = STYLES.get(style)  # transformers may know styles that we do not
    return cls is not None and cls.experts


def cuts_layers(model: nn.Module, plan: ParallelPlan) -> bool:
    """Whether a plan cuts a layer of the blocks that is no expert."""
    blocks = tuple(f"{block}." for block in block_names(model))
    inside = ((name, module) for name, module in model.named_modules() if name.startswith(blocks))
    layers = [name for name, module in inside if isinstance(base_layer(module), nn.Linear)]
    return any(match_names(glob, layers) for glob, style in plan.styles.items() if style != "replicate")


def with_experts(model: nn.Module, plan: ParallelPlan, tp: int) -> ParallelPlan:
    """``plan`` with those experts cut that it leaves whole and that transformers has rules for."""
    if pretrained(model) is None:
        return plan
    prefix, inner = text_model(model)
    config = text_config(model)
    modules = dict(model.named_modules())
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    known = [name for glob in plan.styles for name in match_names(glob, [*modules, *parameters])]
    for rules in (own_tp_plan(inner), getattr(config, "base_model_ep_plan", None)):
        styles = _expert_rules(rules or {}, f"{prefix}." if prefix else "")
        owners = [
            name for glob, style in styles.items() if _is_for_experts(style) for name in match_names(glob, modules)
        ]
        below = tuple(f"{owner}." for owner in owners)
        if not owners or any(name in owners or name.startswith(below) for name in known):
            continue
        if "ep_dispatch_experts" in styles.values() and not all(_divides(modules[owner], tp) for owner in owners):
            continue
        kept = {glob: style for glob, style in styles.items() if match_names(glob, [*modules, *parameters])}
        note = (
            f"{', '.join(glob for glob in kept if _is_for_experts(kept[glob]))}: experts are cut as transformers says."
        )
        return replace(plan, styles={**plan.styles, **kept}, notes=(*plan.notes, note))
    return plan


def _expert_rules(rules: Mapping[str, str], prefix: str) -> dict[str, str]:
    """The rules of one plan for its batched experts and the parameters below them."""
    owners = [glob for glob, style in rules.items() if _is_for_experts(style)]
    below = tuple(f"{owner}." for owner in owners)
    found = {glob: style for glob, style in rules.items() if glob in owners or glob.startswith(below)}
    if "grouped_gemm" in found.values():
        # Whole experts. In transformers 5.17 the router's style picked a rank's own; here the router stays as it is.
        found |= dict.fromkeys(owners, "ep_dispatch_experts")
    return {prefix + glob: style for glob, style in found.items()}


def _divides(module: nn.Module, tp: int) -> bool:
    count = module.__dict__.get("num_experts")
    return isinstance(count, int) and count % tp == 0
