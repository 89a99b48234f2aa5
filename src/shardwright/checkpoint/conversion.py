"""Which file entries make up which tensor of a model, by transformers' own conversion rules, in both directions.

transformers renames keys, stacks experts, fuses gate and up. Here its rules run on :class:`LazyTensor` s, so they
say where every part of a parameter lies; where a rule computes more than that, it runs on whole tensors instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from shardwright._transformers import conversions_of, names_not_saved
from shardwright.checkpoint.folder import Entry
from shardwright.checkpoint.lazy import LazyTensor, NotLazyError
from shardwright.errors import CheckpointError

ReadWhole = Callable[[str], Tensor]


@dataclass(frozen=True)
class Reading:
    """How one tensor of the model comes out of a folder.

    Attributes:
        shape: of the whole tensor.
        entries: the file entries it is made of.
        lazy: where each of its parts lies; None when its values have to be computed.
        compute: the whole tensor, from a function that reads whole entries.
    """

    shape: torch.Size
    entries: tuple[str, ...]
    lazy: LazyTensor | None
    compute: Callable[[ReadWhole], Tensor]


@dataclass(frozen=True)
class LoadPlan:
    """What to read for every tensor that the folder has, and what is left over on either side."""

    readings: dict[str, Reading]
    unused: tuple[str, ...]
    conversions: list[Any]  # those that applied: save_pretrained reverts them

    def renamed(self, names: Mapping[str, str]) -> LoadPlan:
        """The same for a model whose tensors have other names: old -> new."""
        return replace(self, readings={names.get(name, name): reading for name, reading in self.readings.items()})


def plan_load(skeleton: PreTrainedModel, entries: Mapping[str, Entry]) -> LoadPlan:
    """How the tensors of ``skeleton`` (a whole model, usually on meta) come out of ``entries``.

    Raises:
        CheckpointError: a conversion rule that does not fit these entries.
    """
    rules = get_model_conversion_mapping(skeleton)
    groups, unused = _group(skeleton, rules, entries)
    readings: dict[str, Reading] = {}
    for group in groups.values():
        readings |= _readings(group, skeleton, entries)
    return LoadPlan(readings, tuple(unused), [rule for rule in rules if rule.was_used()])


@dataclass
class _Group:
    """File entries that are converted together.

    Attributes:
        target: the (first) tensor of the model that comes out.
        converter: the rule; None when the entry is taken as it is.
        members: (entry, the pattern of the rule that it matched).
    """

    target: str
    converter: WeightConverter | None
    members: list[tuple[str, str]]

    def convert(self, value: Callable[[str], Any], skeleton: PreTrainedModel) -> dict[str, Any]:
        """Name -> tensor of what comes out when ``value(entry)`` goes in."""
        if self.converter is None:
            return {self.target: value(self.members[0][0])}
        converter = deepcopy(self.converter)
        for entry, pattern in self.members:
            converter.add_tensor(self.target, entry, pattern, value(entry))
        made = converter.convert(self.target, model=skeleton, config=skeleton.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


def _group(
    skeleton: PreTrainedModel, rules: Sequence[Any], entries: Mapping[str, Entry]
) -> tuple[dict[str, _Group], list[str]]:
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix, targets = skeleton.base_model_prefix, skeleton.state_dict()
    groups: dict[str, _Group] = {}
    unused = []
    for entry in sorted(entries, key=dot_natural_key):
        target, pattern = rename_source_key(entry, renamings, converters, prefix, targets)
        if target not in targets and entry in targets:
            target, pattern = rename_source_key(entry, [], [], prefix, targets)
        if target not in targets or (pattern is None and target in groups):
            unused.append(entry)
        elif pattern is None:
            groups[target] = _Group(target, None, [(entry, entry)])
        else:
            group = groups.setdefault(target, _Group(target, by_pattern[pattern], []))
            group.members.append((entry, pattern))
    return groups, unused


def _readings(group: _Group, skeleton: PreTrainedModel, entries: Mapping[str, Entry]) -> dict[str, Reading]:
    names = tuple(entry for entry, _ in group.members)
    made: dict[str, Any]
    try:
        made = group.convert(lambda entry: LazyTensor.of(entry, entries[entry].shape), skeleton)
    except NotLazyError:
        made = _dry_run(group, skeleton, entries)

    def compute(name: str) -> Callable[[ReadWhole], Tensor]:
        return lambda read: group.convert(read, skeleton)[name]

    return {
        name: Reading(value.shape, names, value if isinstance(value, LazyTensor) else None, compute(name))
        for name, value in made.items()
    }


def _dry_run(group: _Group, skeleton: PreTrainedModel, entries: Mapping[str, Entry]) -> dict[str, Any]:
    try:
        return group.convert(lambda entry: torch.empty(entries[entry].shape, device="meta"), skeleton)
    except (RuntimeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"The {len(group.members)} checkpoint entries for {group.target} (first: {group.members[0][0]}) do not fit "
            f"together: {error}. The checkpoint belongs to another model, or is not whole."
        ) from error


@dataclass(frozen=True)
class Writing:
    """Tensors of a model that become file entries together.

    Attributes:
        tensors: their names in the model.
        entries: the names and values (on meta) of what comes out.
    """

    tensors: tuple[str, ...]
    entries: Mapping[str, Tensor]

    def convert(self, values: Mapping[str, Tensor], skeleton: PreTrainedModel) -> dict[str, Tensor]:
        """The entries' values, from the whole tensors ``values``."""
        made = _revert(skeleton, dict(values))
        return {name: made[name] for name in self.entries}


@dataclass(frozen=True)
class SavePlan:
    """Which tensors become which file entries, and the entries (on meta) in the order of the files."""

    writings: tuple[Writing, ...]
    entries: dict[str, Tensor]


def plan_save(skeleton: PreTrainedModel) -> SavePlan:
    """How the tensors of ``skeleton`` (a whole model on meta) become file entries; one of those that are tied.

    It is the reverse of what was done when the model was loaded, which ``skeleton._weight_conversions`` says as in
    any transformers model; where that is not set, the reverse of transformers' rules for the class.

    Raises:
        CheckpointError: tensors that cannot be converted a few at a time.
    """
    metas = remove_tied_weights_from_state_dict(skeleton.state_dict(), skeleton)
    for name in names_not_saved(skeleton):
        metas.pop(name, None)
    made = _revert(skeleton, metas)
    same = {id(meta): name for name, meta in metas.items()}
    writings = [Writing((same[id(value)],), {name: value}) for name, value in made.items() if id(value) in same]
    renamed = {name for writing in writings for name in writing.tensors}
    for names in _converted_together(skeleton, [name for name in metas if name not in renamed]):
        entries = _revert(skeleton, {name: metas[name] for name in names})
        writings.append(Writing(tuple(names), entries))
    if {name for writing in writings for name in writing.entries} != set(made):
        raise CheckpointError(
            f"The weights of {type(skeleton).__name__} cannot be turned into their file layout a few at a time. Gather "
            "the model and use its own save_pretrained."
        )
    return SavePlan(tuple(writings), made)


def _revert(skeleton: PreTrainedModel, values: dict[str, Tensor]) -> dict[str, Tensor]:
    if conversions_of(skeleton) == []:  # nothing was converted: transformers would only sort
        return values
    return revert_weight_conversion(skeleton, values)


def _converted_together(skeleton: PreTrainedModel, names: Sequence[str]) -> list[list[str]]:
    rules = conversions_of(skeleton) or get_model_conversion_mapping(skeleton, add_legacy=False)
    converters: list[Any] = [rule.reverse_transform() for rule in rules[::-1] if isinstance(rule, WeightConverter)]
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=dot_natural_key):
        target, _ = rename_source_key(name, [], converters, reverse=True)
        groups.setdefault(target, []).append(name)
    return list(groups.values())
