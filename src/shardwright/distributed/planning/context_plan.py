"""``ContextPlan``: what context parallelism does to a model, as data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import lcm

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
        heads: of the queries; ``key_heads`` of keys and values, whose heads have ``key_size`` and ``value_size``.
        all_keys: whether its kernel needs all keys. Else only those are exchanged that the queries of a rank look at,
            where that is less.
        window: how many positions a query looks at, where the kernel is told; its own among them.
    """

    kernel: str
    own_keys: bool
    method: str
    why: str
    heads: int = 0
    key_heads: int = 0
    key_size: int = 0
    value_size: int = 0
    all_keys: bool = False
    window: int | None = None

    def sent_per_position(self, cp: int, tp: int = 1) -> float:
        """Elements that a rank sends forward for each position of a sequence, and backward as many."""
        heads, key_heads = self.heads // tp, max(self.key_heads // tp, 1)
        if self.method == "ulysses":
            shared = lcm(key_heads, cp)
            exchanged = heads * (self.key_size + self.value_size) + shared * (self.key_size + self.value_size)
            return exchanged / cp * (cp - 1) / cp
        return key_heads * (self.key_size + self.value_size) * (cp - 1) / cp if self.own_keys else 0.0

    def sent_per_sequence(self, tp: int = 1) -> int:
        """Elements that a rank sends forward for each sequence of which the chunks are longer than the window."""
        assert self.windowed
        assert self.window is not None
        return (self.window - 1) * max(self.key_heads // tp, 1) * (self.key_size + self.value_size)

    @property
    def windowed(self) -> bool:
        """Whether what is sent for long sequences depends on the window alone."""
        return self.method == "gather" and self.own_keys and not self.all_keys and self.window is not None

    @property
    def sends(self) -> str:
        """What happens, for a reader."""
        if self.method == "ulysses":
            return "exchanges positions for heads"
        if self.windowed:
            return f"fetches the keys and values of its window, {self.window} positions"
        return "gathers keys and values" if self.own_keys else "attends to keys that are whole already"


@dataclass(frozen=True)
class ContextPlan:
    """What context parallelism does to a model, by name of the module.

    Attributes:
        blocks: blocks that run on a part of the sequence.
        whole: blocks that run on all of it -> why.
        regions: parts of split blocks that see the whole sequence -> what comes and goes in parts.
        reasons: those parts -> why.
        gathered: those parts -> elements of their arguments that are gathered, for each position.
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
    gathered: Mapping[str, int] = field(default_factory=dict)
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
