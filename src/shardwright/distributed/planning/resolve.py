"""From a plan to exact names: matched, checked, and complete, before anything is changed.

Pure: needs no process group, no GPU and no weights.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

from torch import nn
from torch.distributed.tensor import DTensor

from shardwright.distributed.models.blocks import owns_parameters
from shardwright.distributed.models.heads import check_heads
from shardwright.distributed.models.huggingface import rotary_key_width
from shardwright.distributed.models.ties import Tie
from shardwright.distributed.plan import ParallelPlan, match_names
from shardwright.distributed.planning.adapters import adapt
from shardwright.distributed.planning.decided import ExpertPlan
from shardwright.distributed.planning.key_values import share_projections
from shardwright.distributed.planning.matching import require_match
from shardwright.distributed.planning.partial_check import layers_on_whole, modules_on_slices
from shardwright.distributed.planning.resolved import ResolvedPlan, StyleUse
from shardwright.distributed.planning.sequence_parallel import find_regions, overlay_sequence_parallel
from shardwright.distributed.replay.reading import ModelReading
from shardwright.distributed.runtime.adapted import base_layer
from shardwright.distributed.runtime.local_arguments import ArgumentCut
from shardwright.distributed.runtime.local_width import WIDTH, arguments_of
from shardwright.distributed.styles import canonical_style
from shardwright.distributed.styles.base import Place, Style
from shardwright.distributed.styles.experts import SpreadExperts
from shardwright.distributed.styles.replicated import ReplicatedPartialGradient
from shardwright.errors import PlanError


def hands_on_slices(style: Style) -> bool:
    return style.output_is_slice


def sums(style: Style) -> bool:
    return style.sums


def resolve(
    reading: ModelReading,
    plan: ParallelPlan,
    tp: int,
    *,
    sequence_parallel: bool = False,
    experts: ExpertPlan | None = None,
    gathered: Container[str] = (),
) -> ResolvedPlan:
    """What ``plan`` means for the model on ``tp`` ranks.

    Args:
        gathered: children of blocks that gather more of the sequence for themselves, as context parallelism has it.
        experts: modules whose experts are spread over ranks, whatever the plan says of them.

    Raises:
        PlanError: a glob that matches nothing, an unknown style, a style that does not fit its module, heads or widths
            that ``tp`` does not divide, tied parameters with styles that contradict each other.
    """
    resolved = ResolvedPlan(plan.source, tp, sequence_parallel, ties=reading.ties, notes=list(plan.notes))
    resolved.heads = sorted({query for query, _ in reading.heads.layers}) if reading.heads is not None else []
    modules = reading.modules
    _check_plain(reading.model)
    _match(reading, plan, resolved)
    _spread_experts(modules, experts, resolved)
    _specialise(reading, resolved)
    adapt(reading, resolved)
    _split_whole_inputs(reading, resolved)
    _settle_ties(modules, resolved)
    _check_size(reading, plan, resolved)
    share_projections(reading, resolved)
    adapt(reading, resolved)
    _localise_attributes(modules, plan, resolved)
    _localise_arguments(modules, plan, resolved)
    _cover(modules, resolved)
    _declare_partial(reading, resolved)
    find_regions(resolved)
    if sequence_parallel:
        overlay_sequence_parallel(reading, resolved, gathered)
    _collect_replicated(modules, resolved)
    _check_styles(modules, resolved)
    return resolved


def _check_size(reading: ModelReading, plan: ParallelPlan, resolved: ResolvedPlan) -> None:
    """Whether the plan is for so many ranks. One that was derived for a size has tried that size's heads."""
    if plan.tp not in (None, resolved.tp, 1) and resolved.tp > 1:
        raise PlanError(
            f"The plan ({plan.source}) is for tp={plan.tp}, not for tp={resolved.tp}. Derive it for that size."
        )
    if plan.tp is None and any(use.reads for use in resolved.modules.values()):
        note = check_heads(reading.model, resolved.tp)
        resolved.notes += [note] if note else []


def _check_plain(model: nn.Module) -> None:
    for name, param in model.named_parameters():
        if isinstance(param, DTensor):
            raise PlanError(f"{name} is a DTensor already: the model has been parallelized. Start from a plain model.")


def _match(reading: ModelReading, plan: ParallelPlan, resolved: ResolvedPlan) -> None:
    modules = reading.modules
    parameters = {
        f"{name}.{own}" if name else own: (name, own)
        for name, module in modules.items()
        for own, param in module._parameters.items()
        if param is not None
    }
    for glob, style in plan.styles.items():
        canonical_style(style)
        found = match_names(glob, modules)
        bare = match_names(glob, parameters)
        if glob not in plan.optional:
            require_match(glob, [*found, *bare], reading.model, plan.source)
        name, options = canonical_style(style)
        for module in found:
            resolved.modules[module] = StyleUse(name, options, rule=glob)
        for parameter in bare:
            resolved.parameters[parameters[parameter]] = style


def _spread_experts(modules: dict[str, nn.Module], experts: ExpertPlan | None, resolved: ResolvedPlan) -> None:
    """Leave experts that are spread over ranks out of tensor parallelism; what stands in them sees a rank's tokens."""
    owners = {name.rpartition(".")[0] for name in experts.parameters} if experts is not None else set()
    for name in experts.modules if experts is not None else ():
        inside = [other for other in modules if other == name or other.startswith(f"{name}.")]
        for other in inside:
            resolved.modules.pop(other, None)
            for own in modules[other]._parameters:
                resolved.parameters.pop((other, own), None)
            if owns_parameters(modules[other]) or other == name:
                style = SpreadExperts if other in owners or other == name else ReplicatedPartialGradient
                rule = "its experts are spread over ranks"
                resolved.modules[other] = StyleUse(style.name, rule=rule, origin="experts")


def _specialise(reading: ModelReading, resolved: ResolvedPlan) -> None:
    """Replace general names by what they mean for the module they are on."""
    blocks = tuple(f"{block}." for block in reading.blocks)
    rotary_width = rotary_key_width(reading.model)
    for name, use in list(resolved.modules.items()):
        module = reading.modules[name]
        if use.made.parameters_only and not owns_parameters(module):
            del resolved.modules[name]
            continue
        place = Place(
            module, name, name == reading.head, name.startswith(blocks), resolved.sequence_parallel, rotary_width
        )
        if (found := use.made.specialised(place)) is not None:
            resolved.modules[name] = StyleUse(*found, rule=use.rule)


def _split_whole_inputs(reading: ModelReading, resolved: ResolvedPlan) -> None:
    """Let row-parallel layers whose input is whole take their slice of it.

    One glob for two kinds of layers (attention and a state-space mixer that both end in ``o_proj``) names readers in
    one of them only. Where the module around a row-parallel layer has no reader, the graph says what its input is.
    """
    uses = resolved.modules.items()
    sliced = [name for name, use in uses if use.made.output_is_slice or use.made.sums_output_gradient]
    sliced += [f"{owner}.{parameter}" for owner, parameter in resolved.parameters]
    around = {ancestor for name in sliced for ancestor in _ancestors(name)}
    alone = {
        name
        for name, use in uses
        if use.made.on_whole_input is not None
        and name.rpartition(".")[0] not in around
        and isinstance(base_layer(reading.modules[name]), nn.Linear)
    }
    if not alone:
        return
    for name in layers_on_whole(reading, alone, resolved.is_styled(hands_on_slices), resolved.is_styled(sums)):
        use = resolved.modules[name]
        assert use.made.on_whole_input is not None
        resolved.modules[name] = StyleUse(
            use.made.on_whole_input, use.options, f"{use.rule}, on a whole input", "slices"
        )


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")[:-1]
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _settle_ties(modules: dict[str, nn.Module], resolved: ResolvedPlan) -> None:
    """Give the other end of a tie the style that keeps it: one tensor can have one layout only."""
    for tie in resolved.ties:
        uses = {name: resolved.modules.get(name) for name, _ in tie.places}
        sharded = {
            name: use
            for name, own in tie.places
            if (use := uses[name]) is not None and not use.made.placement(modules[name], own).is_replicate()
        }
        if not sharded:
            continue
        for name, parameter in tie.places:
            if uses[name] is not None:
                continue
            other, use = next(iter(sharded.items()))
            rule = f"tied to {other}"
            if isinstance(modules[name], nn.Linear) and type(modules[name]) is type(modules[other]):
                resolved.modules[name] = replace(use, rule=rule, origin="tie")
            elif isinstance(modules[name], nn.Embedding):
                resolved.modules[name] = StyleUse("embedding_rowwise", rule=rule, origin="tie")
            elif isinstance(modules[name], nn.Linear):
                resolved.modules[name] = StyleUse("colwise_logits", rule=rule, origin="tie")
            else:
                resolved.parameters[name, parameter] = "colwise"
                resolved.modules[name] = StyleUse("local_params", rule=rule, origin="tie")
        _check_tie(modules, resolved, tie)


def _check_tie(modules: dict[str, nn.Module], resolved: ResolvedPlan, tie: Tie) -> None:
    layouts = {}
    for name, parameter in tie.places:
        layouts[name] = resolved.placement(name, modules[name], parameter)
    if len(set(layouts.values())) > 1:
        rows = ", ".join(f"{name} ({resolved.modules[name].style}: {layout})" for name, layout in layouts.items())
        raise PlanError(
            f"{' and '.join(tie.names)} are one parameter, but their styles lay it out differently: {rows}. Give them "
            "styles that cut the same dim ('embedding_rowwise' with 'colwise'), or 'replicate' both."
        )


def _localise_attributes(modules: dict[str, nn.Module], plan: ParallelPlan, resolved: ResolvedPlan) -> None:
    """Divide the sizes that attention code reads from its module, as the plan lists them."""
    for glob, names in plan.local_attributes.items():
        for module in match_names(glob, modules):
            own = resolved.attributes.setdefault(module, {})
            for name in names:
                if name in own:
                    continue
                value = _attribute(modules[module], name)
                if not isinstance(value, int) or value % resolved.tp:
                    raise PlanError(
                        f"{module}.{name} is {value!r}; the plan makes it rank-local, so it must be a whole number "
                        f"that tp={resolved.tp} divides."
                    )
                own[name] = value // resolved.tp


def _localise_arguments(modules: dict[str, nn.Module], plan: ParallelPlan, resolved: ResolvedPlan) -> None:
    """Match the arguments that the plan cuts by heads to modules."""
    for glob, texts in plan.local_arguments.items():
        widths = [text.partition(":")[0] for text in texts if text.endswith(f":{WIDTH}")]
        cuts = tuple(ArgumentCut.parse(text) for text in texts if not text.endswith(f":{WIDTH}"))
        uneven = [cut for cut in cuts if cut.heads % resolved.tp]
        if uneven:
            raise PlanError(
                f"{glob!r} cuts {uneven[0].argument} by {uneven[0].heads} heads; tp={resolved.tp} does not divide."
            )
        found = match_names(glob, modules)
        if cuts:
            resolved.arguments |= dict.fromkeys(found, cuts)
        for name in found if widths else ():
            resolved.widths[name] = _width_argument(name, widths, modules, resolved)


def _width_argument(name: str, widths: list[str], modules: dict[str, nn.Module], resolved: ResolvedPlan) -> str:
    readers = [other for other, use in resolved.modules.items() if use.made.output_is_slice]
    if len(widths) > 1 or widths[0] not in arguments_of(modules[name]):
        raise PlanError(f"{name} has no single argument {' or '.join(widths)} whose width can be made rank-local.")
    if not any(other.rpartition(".")[0] == name for other in readers):
        raise PlanError(
            f"The plan makes the width of {widths[0]!r} rank-local in {name}, but no layer directly below {name} is "
            "column-parallel: nothing there reads it whole."
        )
    return widths[0]


def _attribute(module: nn.Module, name: str) -> object:
    holder, _, key = name.rpartition(".")
    return getattr(module.__dict__.get(holder), key, None) if holder else module.__dict__.get(name)


def _cover(modules: dict[str, nn.Module], resolved: ResolvedPlan) -> None:
    """Give every module that owns parameters a style: what no rule names is whole."""
    owners = {name for name, _ in resolved.parameters}
    for name, module in modules.items():
        if name in owners and name not in resolved.modules:
            resolved.modules[name] = StyleUse("local_params", rule="owns parameters with styles", origin="no rule")
        elif owns_parameters(module) and name not in resolved.modules:
            resolved.modules[name] = StyleUse("replicate", origin="no rule")


def _declare_partial(reading: ModelReading, resolved: ResolvedPlan) -> None:
    """Sum the gradients of whole modules that the plan does not name, but that work on this rank's slice."""
    readers = [name.rpartition(".")[0] for name, use in resolved.modules.items() if use.made.output_is_slice]
    inside = tuple({f"{region}." for region in readers if region})
    unnamed = {
        name
        for name, use in resolved.modules.items()
        if use.style == "replicate" and use.origin == "no rule" and name.startswith(inside)
    }
    if not inside or not unnamed:
        return
    sliced = modules_on_slices(reading, unnamed, resolved.is_styled(hands_on_slices), resolved.is_styled(sums))
    for name in sliced:
        rule = "works on this rank's slice"
        resolved.modules[name] = StyleUse(ReplicatedPartialGradient.name, rule=rule, origin="slices")


def _collect_replicated(modules: dict[str, nn.Module], resolved: ResolvedPlan) -> None:
    """List the parameters that stay replicated, and the modules among whose gradients are sums."""
    for name, use in resolved.modules.items():
        replicated = tuple(
            key
            for key, param in modules[name]._parameters.items()
            if param is not None and (name, key) not in resolved.parameters
            if use.made.placement(modules[name], key).is_replicate()
        )
        if not replicated or use.options.get("outside"):
            continue  # norms outside of the blocks see to their own gradients
        resolved.replicated[name] = replicated
        if use.made.partial_gradients or (use.made.writes and (use.sequence or use.inside)):
            resolved.summed[name] = replicated


def _check_styles(modules: dict[str, nn.Module], resolved: ResolvedPlan) -> None:
    for name, use in resolved.modules.items():
        use.made.check(modules[name], name, resolved.tp)


def sharded_fraction(reading: ModelReading, resolved: ResolvedPlan) -> float:
    """The share of the model's parameters that tensor parallelism cuts."""
    counted: dict[int, tuple[int, bool]] = {}
    for name, module in reading.modules.items():
        for own, param in module._parameters.items():
            if param is not None and name in resolved.modules:
                cut = not resolved.placement(name, module, own).is_replicate()
                counted[id(param)] = (param.numel(), cut)
    total = sum(count for count, _ in counted.values())
    return sum(count for count, cut in counted.values() if cut) / total if total else 0.0
