"""What FSDP2 gathers and reduces in one forward and backward of a micro-batch, and what it keeps in between."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from shardwright.distributed.config import ParallelConfig
from shardwright.distributed.planning.decided import DecidedPlan
from shardwright.distributed.planning.layout import ParameterLayout
from shardwright.estimate.units import unit_bytes


@dataclass(frozen=True)
class Gathering:
    """FSDP2's part of a micro-batch. Bytes are those of one rank.

    Attributes:
        units: how many there are, the root's among them.
        kept: blocks that stay gathered between forward and backward.
        kept_bytes: of the parameters of all units that do: the root's always does.
        largest_bytes: of the largest unit's parameters; those of the others come and go.
        forward_gathers: all-gathers in forward.
        backward_gathers: all-gathers in backward.
        reduces: reduce-scatters of gradients.
        sent: bytes that a rank sends for these, in rings. Sums over replicas are not in it.
    """

    units: int
    kept: int
    kept_bytes: int
    largest_bytes: int
    forward_gathers: int
    backward_gathers: int
    reduces: int
    sent: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def predict_gathering(
    layouts: Iterable[ParameterLayout], decided: DecidedPlan, config: ParallelConfig
) -> Gathering | None:
    """The gathers of FSDP2's units under ``config``; None where FSDP2 has no part in it."""
    plan = decided.data
    if plan is None:
        return None
    used = {name: unit for name, unit in unit_bytes(layouts, plan, config).items() if unit.gathered}
    stay = {unit.modules[0] for unit in plan.units if not unit.reshard_after_forward} & set(used)
    sent = sum(unit.sent_reducing + unit.sent_gathering * (1 if name in stay else 2) for name, unit in used.items())
    return Gathering(
        units=len(used),
        kept=len(stay & set(decided.blocks)),
        kept_bytes=sum(used[name].gathered for name in stay),
        largest_bytes=max((unit.gathered for unit in used.values()), default=0),
        forward_gathers=len(used),
        backward_gathers=len(used) - len(stay),
        reduces=sum(unit.gradients > 0 for unit in used.values()),
        sent=sent,
    )
