"""From what was decided to a plan: styles for every layer, as globs a person would write, and a sentence per region."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn

from shardwright.distributed.models.huggingface import head_name
from shardwright.distributed.plan import ParallelPlan, match_names
from shardwright.distributed.planning.derive.decide import Group, Study
from shardwright.distributed.replay.repeats import Repeats
from shardwright.distributed.runtime.local_width import WIDTH
from shardwright.distributed.styles.cuts import Cut

T = TypeVar("T")

# A linear layer this much smaller than the model's largest is not worth a collective of its own (routers, small heads).
WORTH_CUTTING = 1 / 10


@dataclass
class Answers:
    """What is known about each kind of module, by kind name.

    Attributes:
        styles: module or parameter kind -> style.
        attributes: module kind -> attributes that become rank-local.
        arguments: module kind -> ``name:dim:heads`` of arguments that are cut, ``name:width`` of one whose width is.
        gathered: kinds of layers that are cut although their region runs whole.
    """

    styles: dict[str, str] = field(default_factory=dict)
    attributes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    arguments: dict[str, tuple[str, ...]] = field(default_factory=dict)
    gathered: dict[str, int] = field(default_factory=dict)


def answers(model: nn.Module, study: Study) -> Answers:
    """Styles of every kind of module that has one."""
    found = region_answers(study)
    _ends(model, study, found)
    _gather(study, found)
    return found


def region_answers(study: Study) -> Answers:
    """What the regions that run on slices ask for."""
    found = Answers()
    sharding, finding, kind = study.sharding, study.finding, study.kind
    for name, cut in sharding.cuts_out.items():
        found.styles[kind(name)] = reader_style(cut, table=study.weightless.stubs[name].kind == "table")
    for name, cut in sharding.cuts_in.items():
        found.styles[kind(name)] = "rowwise" if len(cut.blocks) == 1 else _packed("packed_rowwise", cut)
    for name in sharding.parameters:
        found.styles[kind(name)] = "colwise"
        found.styles.setdefault(kind(name).rpartition(".")[0], "local_params")
    for name in finding.partial_parameters:
        found.styles.setdefault(kind(name).rpartition(".")[0], "replicated_with_grad_allreduce")
    for name in finding.partial_outputs:
        found.styles[kind(name)] = "mla_kv_a_proj"
    for name, values in sorted(sharding.attributes.items()):
        known = found.attributes.get(kind(name), ())
        found.attributes[kind(name)] = tuple(dict.fromkeys([*known, *sorted(values)]))
    for name, cuts in sharding.arguments.items():
        found.arguments[kind(name)] = tuple(map(str, cuts))
    for name, argument in sharding.widths.items():
        known = found.arguments.get(kind(name), ())
        found.arguments[kind(name)] = tuple(dict.fromkeys([*known, f"{argument}:{WIDTH}"]))
    return found


def reader_style(cut: Cut, *, table: bool) -> str:
    """The style of a layer whose output is cut that way."""
    if table:
        return "embedding_slice"
    if len(cut.blocks) == 1 and cut.blocks[0][1] == 0:
        return "colwise"
    widths = {width for width, _ in cut.blocks}
    if len(widths) == 1 and not any(pieces for _, pieces in cut.blocks):
        return _packed("packed_colwise", cut)
    return "fused_qkv:" + ",".join(f"{width}/{pieces}" if pieces else f"{width}" for width, pieces in cut.blocks)


def _packed(style: str, cut: Cut) -> str:
    return style if len(cut.blocks) == 2 else f"{style}:{len(cut.blocks)}"


def _ends(model: nn.Module, study: Study, found: Answers) -> None:
    """Token embeddings and output head, cut over the vocabulary."""
    stubs = study.weightless.stubs
    tables = {name: stubs[name].width_in for name, _ in study.record.run.calls if stubs[name].kind == "table"}
    largest = max(tables.values(), default=0)
    for name, rows in tables.items():
        if rows == largest and rows >= 4 * study.size and study.usable(name):
            found.styles.setdefault(study.kind(name), "embedding_rowwise")
    head = head_name(model)
    if head is not None and head in stubs and stubs[head].kind == "linear" and study.usable(head):
        found.styles.setdefault(study.kind(head), "colwise_logits")


def _gather(study: Study, found: Answers) -> None:
    """Cut the other large linear layers too: their weights are sharded, their inputs and outputs whole."""
    stubs = study.weightless.stubs
    called = {name for name, _ in study.record.run.calls if stubs[name].kind == "linear" and study.usable(name)}
    sizes = {name: stubs[name].width_in * stubs[name].width_out for name in called}
    inner = [size for name, size in sizes.items() if found.styles.get(study.kind(name)) != "colwise_logits"]
    largest = max(inner, default=0)
    for name in sorted(called):
        kind, stub = study.kind(name), stubs[name]
        if kind in found.styles or sizes[name] < WORTH_CUTTING * largest or name in study.finding.partial_outputs:
            continue
        # Features moved per token in forward and backward; an all-reduce moves each of them twice.
        as_reader = stub.width_out + 2 * stub.width_in
        as_writer = 2 * stub.width_out + stub.width_in
        if min(stub.width_in, stub.width_out) < study.size:
            continue
        by_rows = as_reader <= as_writer or name in study.tied
        found.styles[kind] = "colwise_gather_output" if by_rows else "rowwise_split_input"
        found.gathered[kind] = as_reader if by_rows else as_writer


def make_plan(model: nn.Module, study: Study, groups: list[Group]) -> ParallelPlan:
    """The plan of the original model."""
    found = answers(model, study)
    repeats = study.weightless.repeats
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    styles = globs(modules + parameters, found.styles, repeats)
    return ParallelPlan(
        styles,
        local_attributes=globs(modules, found.attributes, repeats),
        local_arguments=globs(modules, found.arguments, repeats),
        source=f"dataflow (tp={study.size})",
        notes=tuple(notes(model, study, groups, found)),
    )


def globs(names: Iterable[str], by_kind: dict[str, T], repeats: Repeats) -> dict[str, T]:
    """One entry per glob where all that it matches agree, else one per name; in the model's order."""
    answer = {name: by_kind.get(repeats.kind_of(name)) for name in names if name}
    matching: dict[str, set[T | None]] = {}
    for name, value in answer.items():
        matching.setdefault(repeats.glob(name), set()).add(value)
    # A glob also matches names that are no index where it has a star.
    clear = {glob for glob, values in matching.items() if len(values) == 1 and match_names(glob, matching) == [glob]}
    result: dict[str, T] = {}
    for name, value in answer.items():
        if value is not None:
            glob = repeats.glob(name)
            result[glob if glob in clear else name] = value
    return result


def notes(model: nn.Module, study: Study, groups: list[Group], found: Answers) -> list[str]:
    """A sentence per group of regions, and one per layer that is cut although its region is whole."""
    bytes_each = next((p.element_size() for p in model.parameters()), 4)
    said = []
    for group in groups:
        region = group.regions[0]
        written = any(name in study.sharding.cuts_in for name, _ in region.outs)
        if region.is_stream or written or not region.ins:
            continue
        outs = _short(study, (name for name, _ in region.outs))
        ins = _short(study, (name for name, _ in region.ins))
        if group.sharding is not None:
            said.append(f"{outs} -> {ins}: runs on slices{_how(study, group)}.")
            continue
        kinds = {study.kind(name) for name, _ in (*region.outs, *region.ins)} & set(found.gathered)
        cost = sum(found.gathered.get(kind, 0) for kind in kinds) * bytes_each
        if kinds and len(region.ins) <= 4:
            said.append(f"{outs} -> {ins}: whole on every rank, {group.reason}; its layers' weights are cut.")
            found.gathered = {kind: moved for kind, moved in found.gathered.items() if kind not in kinds}
            said[-1] = said[-1][:-1] + f", which moves {cost} bytes per token and step."
    for kind, moved in found.gathered.items():
        cost = moved * bytes_each
        said.append(f"{_readable(kind)}: weight cut, output whole; moves {cost} bytes per token and step.")
    return list(dict.fromkeys(said))


def _how(study: Study, group: Group) -> str:
    assert group.sharding is not None
    parts = []
    attributes = sorted({attribute for values in group.sharding.attributes.values() for attribute in values})
    if attributes:
        parts.append(f"its code reads {' and '.join(attributes)}, made rank-local")
    arguments = sorted({cut.argument for cuts in group.sharding.arguments.values() for cut in cuts})
    if arguments:
        parts.append(f"{' and '.join(arguments)} is cut by heads")
    if group.sharding.widths:
        parts.append(f"it sees a rank's width of {' and '.join(sorted(set(group.sharding.widths.values())))}")
    if group.sharding.parameters:
        parts.append(f"{', '.join(sorted({p.rpartition('.')[2] for p in group.sharding.parameters}))} cut with it")
    return f" ({'; '.join(parts)})" if parts else ""


def _short(study: Study, names: Iterable[str]) -> str:
    kinds = list(dict.fromkeys(_readable(study.kind(name)) for name in names))
    shown = ", ".join(kinds[:6])
    return shown if len(kinds) <= 6 else f"{shown} and {len(kinds) - 6} more"


def _readable(kind: str) -> str:
    return re.sub(r"\{\d+\}", "*", kind)
