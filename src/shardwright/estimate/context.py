"""What context-parallel ranks send for attention and other mixers of positions, for a reader."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
    """

    where: str
    layers: int
    method: str
    sent: float

    def to_dict(self) -> dict[str, str | int | float]:
        return {
            "where": self.where,
            "layers": self.layers,
            "method": self.method,
            "sent_forward_per_token": self.sent,
            "sent_backward_per_token": self.sent,
        }


def context_traffic(plan: ContextPlan | None, config: ParallelConfig, itemsize: int) -> tuple[ContextTraffic, ...]:
    """By kind of module, in the model's order. Blocks that run whole are not among them (their input is gathered).

    Args:
        itemsize: bytes of the dtype that activations have.
    """
    if plan is None:
        return ()
    cp = config.cp
    kinds: dict[tuple[str, str, float], int] = {}
    for name, use in plan.attention.items():
        kind = numbers_to_globs(name), use.method, use.sent_per_position(cp, config.tp) * itemsize
        kinds[kind] = kinds.get(kind, 0) + 1
    for name, elements in plan.gathered.items():
        kind = numbers_to_globs(name), "whole", elements * itemsize * (cp - 1) / cp
        kinds[kind] = kinds.get(kind, 0) + 1
    return tuple(ContextTraffic(where, layers, method, sent) for (where, method, sent), layers in kinds.items())


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
            f"a rank sends {part.sent / 1024:.3g} KiB forward and as much backward, in each of them."
        )
