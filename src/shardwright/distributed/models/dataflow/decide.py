"""Which regions can run on slices, and how: by reading dependencies, then by trying.

For a region, the writers' inputs are dealt out to the ranks in slices, and backward shows which features of the readers
each slice depends on. Where every slice has features of its own (whole heads, gate and up of one neuron), the readers
are cut along them. Then every rank is played. If the region's code does not run because a size is written down in an
attribute of its modules, or because an argument holds an entry for each head, the smallest set of those that makes
every rank exact is found by trying.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from shardwright.distributed.models.dataflow.cuts import Cut, contiguous, cut_from_masks, packed
from shardwright.distributed.models.dataflow.hollow import Hollow
from shardwright.distributed.models.dataflow.play import (
    CODE_ERRORS,
    ArgumentCut,
    Finding,
    Inputs,
    Record,
    Sharding,
    rank_runs,
)
from shardwright.distributed.models.dataflow.regions import Key, Region, dependencies
from shardwright.distributed.models.dataflow.tape import Mismatch

# Sets of attributes are tried smallest first, up to this many in a set.
MOST_ATTRIBUTES = 3


@dataclass
class Group:
    """Regions of one kind, one for each block that has it; what is decided holds for all."""

    regions: list[Region] = field(default_factory=list)
    sharding: Sharding | None = None
    finding: Finding | None = None
    reason: str = ""


@dataclass
class Study:
    """A model, its full run, and what has been decided so far.

    Attributes:
        size: number of ranks.
        sharding: all that has been found exact.
        finding: what the last exact rank runs showed.
    """

    hollow: Hollow
    record: Record
    inputs: Inputs
    size: int
    sharding: Sharding = field(default_factory=Sharding)
    finding: Finding = field(default_factory=Finding)

    def kind(self, hollow_name: str) -> str:
        return self.hollow.repeats.kind_of(self.hollow.repeats.original_name(hollow_name))

    def attempt(self, extra: Sharding) -> Finding | None:
        """What the ranks show when ``extra`` is added to what has been decided; None where it is not exact."""
        try:
            finding = rank_runs(self.hollow, self.record, self.inputs, self.sharding.with_(extra), self.size)
        except (Mismatch, *CODE_ERRORS):
            return None
        return finding if self._has_styles(finding) else None

    def _has_styles(self, finding: Finding) -> bool:
        """Whether there is a style for every gradient that is a sum: so far, for whole parameters."""
        return not finding.partial_outputs


def decide(study: Study, regions: list[Region]) -> list[Group]:
    """Find a sharding for every group of regions that has one, the last ones of the forward first."""
    groups: dict[tuple[frozenset[str], frozenset[str]], Group] = {}
    for region in regions:
        key = frozenset(study.kind(n) for n, _ in region.outs), frozenset(study.kind(n) for n, _ in region.ins)
        groups.setdefault(key, Group()).regions.append(region)
    # A layer can be a writer of one region and a reader of the next; the reader's part wins (it feeds heads).
    for group in reversed(list(groups.values())):
        if any(region.is_stream for region in group.regions):
            group.reason = "the residual stream"
            continue
        for sharding in _candidates(study, group):
            finding = study.attempt(sharding)
            if finding is not None:
                group.sharding, group.finding = sharding, finding
                study.sharding, study.finding = study.sharding.with_(sharding), finding
                break
    return list(groups.values())


def _candidates(study: Study, group: Group) -> Iterator[Sharding]:
    """Ways to cut the group's regions, the simplest first."""
    for base in _cuts(study, group):
        yield base
        attributes = _attributes(study, group)
        arguments = _arguments(study, group, attributes)
        for count in range(MOST_ATTRIBUTES + 1):
            for chosen in itertools.combinations(attributes, count):
                divided = {place for places in chosen for place in places}
                if chosen:
                    yield base.with_(Sharding(attributes=divided))
                if count <= 2:
                    for argument in arguments:
                        yield base.with_(Sharding(attributes=divided, arguments=argument))


def _cuts(study: Study, group: Group) -> Iterator[Sharding]:
    """Cuts of readers, writers and parameters that the dependencies allow."""
    region = group.regions[0]
    pinned = set(study.sharding.cuts_out)
    outs, ins = {name for name, _ in region.outs}, {name for name, _ in region.ins}
    whole_ins = (outs & ins) | pinned | {n for n in ins if study.hollow.stubs[n].kind != "linear"}
    writers = [key for key in region.ins if key[0] not in whole_ins]
    upstream = {source for key in region.ins if key[0] in whole_ins for source in region.feeds[key]}
    readers = [key for key in region.outs if key not in upstream and study.hollow.stubs[key[0]].kind != "opaque"]
    if not writers or not readers:
        group.reason = "no layer reads what these write, or none writes what these read"
        return
    for pieces in (1, 2, 3):
        cut = _writer_cut(study, pieces)
        shares = [_share(cut, rank, study) for rank in range(study.size)]
        if any(not _divides(study, key, pieces) for key in writers):
            continue
        masks = dependencies(study.hollow, study.record, region, writers, shares)
        sharding = _from_masks(study, group, masks, writers, readers, cut)
        if sharding is not None:
            yield sharding


def _divides(study: Study, key: Key, pieces: int) -> bool:
    width = study.hollow.stubs[key[0]].width_in
    return width >= study.size * pieces and (pieces == 1 or width % (pieces * study.size) == 0)


def _writer_cut(study: Study, pieces: int) -> Callable[[str], Cut]:
    def cut(name: str) -> Cut:
        width = study.hollow.stubs[name].width_in
        return contiguous(width) if pieces == 1 else packed(width, pieces)

    return cut


def _share(cut: Callable[[str], Cut], rank: int, study: Study) -> Callable[[Key], Tensor]:
    return lambda key: cut(key[0]).indices(study.hollow.stubs[key[0]].width_in, rank, study.size)


def _from_masks(
    study: Study,
    group: Group,
    masks: list[dict],  # type: ignore[type-arg]
    writers: list[Key],
    readers: list[Key],
    writer_cut: Callable[[str], Cut],
) -> Sharding | None:
    by_kind: dict[str, Cut] = {}
    for key in readers:
        cut = cut_from_masks([m[key] for m in masks])
        if cut is None:
            group.reason = f"the features of {study.kind(key[0])} mix across slices"
            return None
        by_kind[study.kind(key[0])] = cut
    if all(pieces == 1 for cut in by_kind.values() for _, pieces in cut.blocks):
        group.reason = "every slice depends on all features"
        return None
    parameters: dict[str, Cut] = {}
    for name in group.regions[0].parameters:
        per_entry = [m[name].reshape(m[name].shape[0], -1).any(1) if m[name].ndim else m[name] for m in masks]
        if per_entry[0].ndim and per_entry[0].numel() >= study.size:
            cut = cut_from_masks(per_entry, equal_only=True)
            if cut is not None:
                parameters[study.kind(name)] = cut
    writer_kinds = {study.kind(name) for name, _ in writers}
    sharding = Sharding()
    names = {name for region in group.regions for name, _ in (*region.outs, *region.ins)}
    for name in sorted(names):
        kind = study.kind(name)
        if kind in by_kind and any(key[0] == name for region in group.regions for key in region.outs):
            sharding.cuts_out[name] = by_kind[kind]
        if kind in writer_kinds:
            sharding.cuts_in[name] = writer_cut(name)
    for name in {name for region in group.regions for name in region.parameters}:
        if study.kind(name) in parameters:
            sharding.parameters[name] = parameters[study.kind(name)]
    return sharding


def _attributes(study: Study, group: Group) -> list[list[tuple[str, str]]]:
    """Integers that the region's modules read and that the ranks divide, one entry per class and name."""
    modules = _modules(study, group)
    together: dict[tuple[type, str], list[tuple[str, str]]] = {}
    for (name, attribute), value in study.record.reads.items():
        if name in modules and name not in study.hollow.stubs and value > 1 and value % study.size == 0:
            cls = type(study.hollow.model.get_submodule(name))
            together.setdefault((cls, attribute), []).append((name, attribute))
    return list(together.values())


def _arguments(
    study: Study, group: Group, attributes: list[list[tuple[str, str]]]
) -> list[dict[str, tuple[ArgumentCut, ...]]]:
    """Tensor arguments of the region's own modules with a dim that holds an entry per head."""
    counts = {study.record.reads[place] for places in attributes for place in places}
    owners = _owners(group)
    options: dict[tuple[str, int, int], dict[str, tuple[ArgumentCut, ...]]] = {}
    for owner in owners:
        for argument, shape in study.record.arguments.get(owner, {}).items():
            for dim, length in enumerate(shape):
                for count in sorted(counts):
                    if length % count == 0:
                        cut = ArgumentCut(argument, dim, count)
                        options.setdefault((argument, dim, count), {})[owner] = (cut,)
    return list(options.values())


def _owners(group: Group) -> set[str]:
    """The innermost module around each region."""
    owners = set()
    for region in group.regions:
        paths = [name.split(".")[:-1] for name, _ in (*region.outs, *region.ins)]
        common = list(itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))
        owners.add(".".join(parts[0] for parts in common))
    return owners


def _modules(study: Study, group: Group) -> set[str]:
    """The modules whose code runs in the region: around its layers, and around the parameters that take part."""
    names = set()
    for region, owner in ((region, owner) for region in group.regions for owner in _owners(Group([region]))):
        leaves = [name for name, _ in (*region.outs, *region.ins)]
        leaves += [name.rpartition(".")[0] + ".parameter" for name in region.parameters]
        for leaf in leaves:
            parts = leaf.split(".")[:-1]
            around = {".".join(parts[:count]) for count in range(len(parts), 0, -1)}
            names |= {name for name in around if name.startswith(owner)}
    return names
