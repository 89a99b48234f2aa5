"""Which regions can run on slices, and how: by reading dependencies, then by trying.

For a region, the writers' inputs are dealt out to the ranks in slices, and backward shows which features of the readers
each slice depends on. Where every slice has features of its own (whole heads, gate and up of one neuron), the readers
are cut along them. Then every rank is replayed. If the region's code does not run because a size is written down in an
attribute of its modules, or because an argument holds an entry for each head, the smallest set of those that makes
every rank exact is found by trying.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from shardwright.distributed.models.huggingface import text_config
from shardwright.distributed.planning.derive.connections import Key, Masks, Region, dependencies
from shardwright.distributed.planning.derive.masks import cut_from_masks
from shardwright.distributed.replay.rank_model import Sharding
from shardwright.distributed.replay.record import CODE_ERRORS, Mismatch
from shardwright.distributed.replay.runs import (
    Finding,
    Inputs,
    Record,
    full_run,
    rank_runs,
    some_ranks_forward,
)
from shardwright.distributed.replay.weightless import WeightlessCopy
from shardwright.distributed.runtime.local_arguments import ArgumentCut
from shardwright.distributed.styles.cuts import Cut, contiguous, packed

# Sets of attributes are tried smallest first, up to this many in a set.
MOST_ATTRIBUTES = 3


@dataclass
class Group:
    """Regions that are decided together: those with the same layers in all blocks.

    Attributes:
        kinds: the regions, by what kinds of layers they have; what is decided for one holds for all of its kind.
        sharding: how they run on slices; None where they do not.
        finding: what the ranks showed.
        reason: why they do not run on slices.
    """

    kinds: list[list[Region]]
    sharding: Sharding | None = None
    finding: Finding | None = None
    reason: str = ""

    @property
    def regions(self) -> list[Region]:
        return [region for regions in self.kinds for region in regions]

    def apart(self) -> list[Group]:
        return [Group([regions]) for regions in self.kinds]


@dataclass
class Study:
    """A model, its full run, and what has been decided so far.

    Attributes:
        size: number of ranks.
        sharding: all that has been found exact.
        finding: what the last exact rank runs showed.
        error: how the last attempt failed.
    """

    weightless: WeightlessCopy
    record: Record
    inputs: Inputs
    size: int
    sharding: Sharding = field(default_factory=Sharding)
    finding: Finding = field(default_factory=Finding)
    error: str = ""

    @cached_property
    def tied(self) -> frozenset[str]:
        """Tables and linear layers that have one weight together, which can only be cut over the vocabulary."""
        holders: dict[int, dict[str, str]] = {}
        for name, stub in self.weightless.stubs.items():
            weight = self.weightless.model.get_submodule(name)._parameters.get("weight")
            holders.setdefault(id(weight), {})[name] = stub.kind
        return frozenset(name for kinds in holders.values() if len(set(kinds.values())) > 1 for name in kinds)

    @property
    def rotary_key(self) -> int | None:
        """The width of the rotary key that the config states, which is what the style of an MLA layer goes by."""
        return getattr(text_config(self.weightless.model), "qk_rope_head_dim", None)

    def kind(self, copied_name: str) -> str:
        return self.weightless.repeats.kind_of(self.weightless.repeats.original_name(copied_name))

    def usable(self, copied_name: str) -> bool:
        """Whether all that touches the weights of the stub's kind is their own forwards."""
        return self.kind(copied_name) not in map(self.kind, self.record.exposed)

    def attempt(self, extra: Sharding) -> Finding | None:
        """What the ranks show when ``extra`` is added to what has been decided; None where it is not exact."""
        try:
            both = self.sharding.with_(extra)
            some_ranks_forward(self.weightless, self.record, self.inputs, both, self.size)
            finding = rank_runs(self.weightless, self.record, self.inputs, both, self.size)
        except Mismatch as error:
            self.error = f"{self.kind(str(error)) if str(error) in self.weightless.stubs else error} gets other values"
            return None
        except CODE_ERRORS as error:
            self.error = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            return None
        return finding if self._has_styles(finding) else None

    def _has_styles(self, finding: Finding) -> bool:
        """Whether there is a style for every gradient that is a sum."""
        for name, features in finding.partial_outputs.items():
            # MLA's rotary key: the last features of a layer that is whole.
            rotary = int(features.sum())
            if self.weightless.stubs[name].kind != "linear" or not bool(features[-rotary:].all()):
                return False
            if rotary != self.rotary_key:
                return False
        owners = {name.rpartition(".")[0] for name in finding.partial_parameters}
        own = {
            f"{owner}.{name}" if owner else name
            for owner in owners
            for name, param in self.weightless.model.get_submodule(owner)._parameters.items()
            if param is not None
        }
        return own <= finding.partial_parameters


def decide(study: Study, regions: list[Region]) -> list[Group]:
    """Find a sharding for every group of regions that has one, the last ones of the forward first."""
    decided: list[Group] = []
    # A layer can be a writer of one region and a reader of the next; the reader's part wins (it feeds heads).
    for together in reversed(_groups(study, regions)):
        for group in [together] if _settle(study, together) or len(together.kinds) == 1 else together.apart():
            if group is not together:
                _settle(study, group)
            decided.insert(0, group)
    return decided


def recheck(study: Study, groups: list[Group], *, seed: int) -> None:
    """Replay every rank with other values than those that the decisions were made with.

    Where that fails, the groups are put together again one by one, and those with which it fails stay whole.
    """
    study.record = full_run(study.weightless, study.inputs, seed=seed)
    chosen = [group for group in groups if group.sharding is not None]
    everything = study.sharding
    study.sharding = Sharding()
    finding = study.attempt(everything)
    if finding is not None:
        study.sharding, study.finding = everything, finding
        return
    study.finding = Finding()
    for group in reversed(chosen):
        assert group.sharding is not None
        finding = study.attempt(group.sharding)
        if finding is None:
            group.sharding, group.reason = None, f"it is not exact on slices with other values ({study.error})"
        else:
            study.sharding, study.finding = study.sharding.with_(group.sharding), finding


def _groups(study: Study, regions: list[Region]) -> list[Group]:
    by_kind: dict[tuple[frozenset[str], frozenset[str]], list[Region]] = {}
    for region in regions:
        key = frozenset(study.kind(n) for n, _ in region.outs), frozenset(study.kind(n) for n, _ in region.ins)
        by_kind.setdefault(key, []).append(region)
    together: dict[tuple[frozenset[str], frozenset[str]], Group] = {}
    for (outs, ins), alike in by_kind.items():
        names = frozenset(map(_without_indices, outs)), frozenset(map(_without_indices, ins))
        together.setdefault(names, Group([])).kinds.append(alike)
    return list(together.values())


def _without_indices(kind: str) -> str:
    return ".".join("*" if part.isdigit() or part.startswith("{") else part for part in kind.split("."))


def _settle(study: Study, group: Group) -> bool:
    """Find a sharding for one group, and add it to what has been decided."""
    if any(region.is_stream for region in group.regions):
        group.reason = "it is the residual stream"
        return False
    for sharding in _candidates(study, group):
        finding = study.attempt(sharding)
        if finding is not None:
            group.sharding, group.finding = sharding, finding
            study.sharding, study.finding = study.sharding.with_(sharding), finding
            return True
        group.reason = group.reason or f"its code does not run on slices ({study.error})"
    return False


def _candidates(study: Study, group: Group) -> Iterator[Sharding]:
    """Ways to cut the group's regions, the simplest first."""
    for pieces in (1, 2, 3, 4):
        base = Sharding()
        for regions in group.kinds:
            cuts = _cuts(study, group, regions, pieces)
            if cuts is None:
                break
            base = base.with_(cuts)
        else:
            for start in (base, base.with_(_widths(study, group))):
                if start is base or start.widths:
                    yield start
                    yield from _with_local_sizes(study, group, start)


def _with_local_sizes(study: Study, group: Group, base: Sharding) -> Iterator[Sharding]:
    attributes = _attributes(study, group)
    arguments = _arguments(study, group, attributes)
    for count in range(MOST_ATTRIBUTES + 1):
        for chosen in itertools.combinations(attributes, count):
            divided = _divided(study, chosen)
            if chosen:
                yield base.with_(Sharding(attributes=divided))
            if count <= 2:
                for argument in arguments:
                    yield base.with_(Sharding(attributes=divided, arguments=argument))


def _divided(study: Study, chosen: Iterable[list[tuple[str, str]]]) -> dict[str, dict[str, int]]:
    """Module -> a rank's values of the attributes that were chosen."""
    values: dict[str, dict[str, int]] = {}
    for module, attribute in (place for places in chosen for place in places):
        values.setdefault(module, {})[attribute] = study.record.reads[module, attribute] // study.size
    return values


def _cuts(study: Study, group: Group, regions: list[Region], pieces: int) -> Sharding | None:
    """Cuts of readers, writers and parameters of regions of one kind that the dependencies allow.

    Args:
        pieces: the writers' inputs are packed of so many blocks.
    """
    region = regions[0]
    pinned = set(study.sharding.cuts_out)
    written = set(study.sharding.cuts_in)
    outs, ins = {name for name, _ in region.outs}, {name for name, _ in region.ins}
    stubs = study.weightless.stubs
    whole_ins = (outs & ins) | pinned | {n for n in ins if stubs[n].kind != "linear" or not study.usable(n)}
    whole_ins |= study.tied & ins
    writers = [key for key in region.ins if key[0] not in whole_ins]
    upstream = {source for key in region.ins if key[0] in whole_ins for source in region.feeds[key]}
    readers = [key for key in region.outs if key not in upstream]
    if any(stubs[name].kind == "opaque" or not study.usable(name) for name, _ in readers):
        group.reason = "a weight in it is used outside of its layer"
        return None
    if any(name in study.tied for name, _ in readers):
        group.reason = "a layer in it is tied to an embedding"
        return None
    if not writers or not readers or any(name in written for name, _ in readers):
        group.reason = "its layers follow one another"
        return None
    if any(not _divides(study, key, pieces) for key in writers):
        group.reason = group.reason or "its width is not divisible"
        return None
    cut = _writer_cut(study, pieces)
    # What is guessed from a few ranks is replayed on all.
    shares = {
        rank: _share(cut, rank, study) for rank in sorted({0, min(1, study.size - 1), study.size // 2, study.size - 1})
    }
    masks = dependencies(study.weightless, study.record, region, writers, shares)
    return _from_masks(study, group, regions, masks, writers, readers, cut)


def _divides(study: Study, key: Key, pieces: int) -> bool:
    width = study.weightless.stubs[key[0]].width_in
    return width >= study.size * pieces and (pieces == 1 or width % (pieces * study.size) == 0)


def _writer_cut(study: Study, pieces: int) -> Callable[[str], Cut]:
    def cut(name: str) -> Cut:
        width = study.weightless.stubs[name].width_in
        return contiguous(width) if pieces == 1 else packed(width, pieces)

    return cut


def _share(cut: Callable[[str], Cut], rank: int, study: Study) -> Callable[[Key], Tensor]:
    return lambda key: cut(key[0]).indices(study.weightless.stubs[key[0]].width_in, rank, study.size)


def _from_masks(
    study: Study,
    group: Group,
    regions: list[Region],
    masks: dict[int, Masks],
    writers: list[Key],
    readers: list[Key],
    writer_cut: Callable[[str], Cut],
) -> Sharding | None:
    by_kind: dict[str, Cut] = {}
    for key in readers:
        cut = cut_from_masks({rank: m[key] for rank, m in masks.items()}, study.size)
        if cut is None:
            group.reason = group.reason or f"features of {key[0].rpartition('.')[2]} mix across slices"
            return None
        by_kind[study.kind(key[0])] = cut
    if all(pieces == 1 for cut in by_kind.values() for _, pieces in cut.blocks):
        group.reason = group.reason or "every slice depends on all features"
        return None
    parameters: dict[str, Cut] = {}
    for name in regions[0].parameters:
        per_entry = {rank: m[name].flatten(1).any(1) if m[name].ndim > 1 else m[name] for rank, m in masks.items()}
        # The style of a bare parameter of three dims or more cuts another dim (batched experts): not this one.
        if masks[0][name].ndim in (1, 2) and per_entry[0].numel() >= study.size:
            cut = cut_from_masks(per_entry, study.size, equal_only=True)
            if cut is not None:
                parameters[study.kind(name)] = cut
    tables = {study.kind(key[0]) for key in readers if study.weightless.stubs[key[0]].kind == "table"}
    if not all(_has_style(cut, table=kind in tables) for kind, cut in by_kind.items()):
        group.reason = group.reason or "no style cuts its layers in the blocks that its heads need"
        return None
    writer_kinds = {study.kind(name) for name, _ in writers}
    sharding = Sharding()
    names = {name for region in regions for name, _ in (*region.outs, *region.ins)}
    for name in sorted(names):
        kind = study.kind(name)
        if kind in by_kind and any(key[0] == name for region in regions for key in region.outs):
            sharding.cuts_out[name] = by_kind[kind]
        if kind in writer_kinds:
            sharding.cuts_in[name] = writer_cut(name)
    for name in {name for region in regions for name in region.parameters}:
        if study.kind(name) in parameters:
            sharding.parameters[name] = parameters[study.kind(name)]
    return sharding


def _has_style(cut: Cut, *, table: bool) -> bool:
    """Whether a layer's output can be cut so: of a table, there are styles for plain slices only."""
    return not table or (len(cut.blocks) <= 1 and not any(parts for _, parts in cut.blocks))


def _attributes(study: Study, group: Group) -> list[list[tuple[str, str]]]:
    """Integers that the region's modules read and that the ranks divide, one entry per class and name."""
    modules = _modules(study, group)
    together: dict[tuple[type, str], list[tuple[str, str]]] = {}
    for (name, attribute), value in study.record.reads.items():
        if name in modules and name not in study.weightless.stubs and value > 1 and value % study.size == 0:
            cls = type(study.weightless.model.get_submodule(name))
            together.setdefault((cls, attribute), []).append((name, attribute))
    return list(together.values())


def _widths(study: Study, group: Group) -> Sharding:
    """The argument of each region's own module that its layers read, whose width its code may read too."""
    widths = {}
    for region in group.regions:
        (owner,) = _owners([region])
        readers = [name for name, _ in region.outs]
        argument, width = study.record.first.get(owner, ("", 0))
        inside = all(name.rpartition(".")[0] == owner for name in readers)
        if not argument or not inside or width % study.size:
            return Sharding()
        if any(study.weightless.stubs[name].width_in != width for name in readers):
            return Sharding()
        widths[owner] = argument
    return Sharding(widths=widths)


def _arguments(
    study: Study, group: Group, attributes: list[list[tuple[str, str]]]
) -> list[dict[str, tuple[ArgumentCut, ...]]]:
    """Tensor arguments of the region's own modules with a dim that holds an entry per head."""
    counts = {study.record.reads[place] for places in attributes for place in places}
    owners = _owners(group.regions)
    options: dict[tuple[str, int, int], dict[str, tuple[ArgumentCut, ...]]] = {}
    for owner in owners:
        for argument, shape in study.record.arguments.get(owner, {}).items():
            for dim, length in enumerate(shape):
                for count in sorted(counts):
                    if length % count == 0:
                        cut = ArgumentCut(argument, dim, count)
                        options.setdefault((argument, dim, count), {})[owner] = (cut,)
    return list(options.values())


def _owners(regions: list[Region]) -> set[str]:
    """The innermost module around each region."""
    owners = set()
    for region in regions:
        paths = [name.split(".")[:-1] for name, _ in (*region.outs, *region.ins)]
        common = list(itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))
        owners.add(".".join(parts[0] for parts in common))
    return owners


def _modules(study: Study, group: Group) -> set[str]:
    """The modules whose code runs in the region: around its layers, and around the parameters that take part."""
    names = set()
    for region in group.regions:
        (owner,) = _owners([region])
        leaves = [name for name, _ in (*region.outs, *region.ins)]
        leaves += [name.rpartition(".")[0] + ".parameter" for name in region.parameters]
        for leaf in leaves:
            parts = leaf.split(".")[:-1]
            around = {".".join(parts[:count]) for count in range(len(parts), 0, -1)}
            names |= {name for name in around if name.startswith(owner)}
    return names
