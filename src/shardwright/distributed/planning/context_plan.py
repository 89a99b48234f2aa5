"""``ContextPlan``: what context parallelism does to a model, as data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from shardwright.distributed.models.blocks import numbers_to_globs
from shardwright.distributed.runtime.context.places import Places


@dataclass(frozen=True)
class SplitBlock:
    """A block that runs on a part of the sequence.

    Attributes:
        stream: the name of the argument that the length is read from.
        places: what of its arguments and results is split.
    """

    stream: str
    places: Places


@dataclass(frozen=True)
class SplitAttention:
    """A module whose attention asks transformers' table.

    Attributes:
        kernel: what the model's config calls the function that runs on the exchanged tensors.
        own_keys: whether the keys are of the module's part; they are of all positions already where not.
        method: ``"ulysses"`` (parts of the sequence are exchanged for parts of the heads) or ``"gather"`` (keys and
            values are gathered).
        why: the reason for it, for a reader.
    """

    kernel: str
    own_keys: bool
    method: str
    why: str

    @property
    def sends(self) -> str:
        """What happens, for a reader."""
        if self.method == "ulysses":
            return "exchanges positions for heads"
        return "gathers keys and values" if self.own_keys else "attends to keys that are whole already"


@dataclass(frozen=True)
class ContextPlan:
    """What context parallelism does to a model, by name of the module.

    Attributes:
        blocks: blocks that run on a part of the sequence.
        whole: blocks that run on all of it -> why.
        regions: parts of split blocks that see the whole sequence -> what comes and goes in parts.
        reasons: those parts -> why.
        attention: modules whose attention runs on a part of the queries or of the heads.
        recorded: modules in split blocks whose results the model hands out beside its own -> what of them is split.
        owners: the models, the outermost and those inside, that hand them out.
        layers: linear layers and norms outside of the blocks, which work on each position.
        caches: whether the model fills a key-value cache when it is not told to.
    """

    blocks: Mapping[str, SplitBlock] = field(default_factory=dict)
    whole: Mapping[str, str] = field(default_factory=dict)
    regions: Mapping[str, Places] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    attention: Mapping[str, SplitAttention] = field(default_factory=dict)
    recorded: Mapping[str, Places] = field(default_factory=dict)
    owners: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    caches: bool = False

    def notes(self) -> Iterator[str]:
        """Sentences for a reader: what is gathered, and what runs whole and why."""
        uses: dict[str, None] = {}
        for name, use in self.attention.items():
            uses.setdefault(f"{numbers_to_globs(name)} {use.sends} ({use.why}).")
        yield from (f"Context parallelism: {use}" for use in uses)
        for names, text in (
            (self.regions, "sees the whole sequence, on every rank alike"),
            (self.whole, "runs on the whole sequence, on every rank alike"),
        ):
            why: Mapping[str, str] = self.whole if names is self.whole else self.reasons
            for glob, reason in dict.fromkeys((numbers_to_globs(name), why.get(name, "")) for name in names):
                yield f"Context parallelism: {glob} {text}" + (f" ({reason})." if reason else ".")
