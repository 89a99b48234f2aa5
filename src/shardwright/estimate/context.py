"""What context-parallel ranks send for attention and other mixers of positions, for a reader."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from shardwright.distributed.config import ParallelConfig
from shardwright.distributed.models.blocks import numbers_to_globs
from shardwright.distributed.planning.context_plan import ContextPlan


@dataclass(frozen=True)
class ContextTraffic:
    """What modules of one kind send over the ``cp`` axis in one forward; backward sends as much.

    Attributes:
        where: the glob of the modules.
        layers: how many there are.
        method: ``"gather"`` (keys and values), ``"ulysses"``, or ``"whole"`` (what the module is given).
        sent: bytes that a rank sends for each position of every sequence, for one module.
        window: how many positions a query looks at, where only those are sent that are looked at.
        sent_per_sequence: bytes that a rank sends at most for each sequence, whatever its length; None: there is no
            such bound.
    """

    where: str
    layers: int
    method: str
    sent: float
    window: int | None = None
    sent_per_sequence: int | None = None

    def to_dict(self) -> dict[str, str | int | float | None]:
        return {
            "where": self.where,
            "layers": self.layers,
            "method": self.method,
            "sent_forward_per_token": self.sent,
            "sent_backward_per_token": self.sent,
            "window": self.window,
            "sent_at_most_per_sequence": self.sent_per_sequence,
        }


def context_traffic(plan: ContextPlan | None, config: ParallelConfig, itemsize: int) -> tuple[ContextTraffic, ...]:
    """By kind of module, in the model's order. Blocks that run whole are not among them (their input is gathered).

    Args:
        itemsize: bytes of the dtype that activations have.
    """
    if plan is None:
        return ()
    cp = config.cp
    kinds: dict[ContextTraffic, int] = {}
    for name, use in plan.attention.items():
        kind = ContextTraffic(
            numbers_to_globs(name), 1, use.method, use.sent_per_position(cp, config.tp) * itemsize,
            use.window if use.windowed else None, use.sent_per_sequence(config.tp) * itemsize if use.windowed else None,
        )  # fmt: skip
        kinds[kind] = kinds.get(kind, 0) + 1
    for name, elements in plan.gathered.items():
        kind = ContextTraffic(numbers_to_globs(name), 1, "whole", elements * itemsize * (cp - 1) / cp)
        kinds[kind] = kinds.get(kind, 0) + 1
    return tuple(replace(kind, layers=layers) for kind, layers in kinds.items())


_SENT = {
    "gather": "keys and values are gathered",
    "ulysses": "positions are exchanged for heads",
    "whole": "what it is given is gathered",
}


def context_notes(traffic: tuple[ContextTraffic, ...]) -> Iterator[str]:
    """A sentence on every kind of module."""
    for part in traffic:
        yield (
            f"Context parallelism: {part.where} ({part.layers} x): {_SENT[part.method]}. For each token of a sequence "
            f"a rank sends {part.sent / 1024:.3g} KiB forward and as much backward, in each of them"
            + _at_most(part)
            + "."
        )


def _at_most(part: ContextTraffic) -> str:
    if part.sent_per_sequence is None:
        return ""
    return (
        f"; and at most {part.sent_per_sequence / 1024:.3g} KiB for each sequence whose chunks are longer than the "
        f"window of {part.window} positions"
    )
