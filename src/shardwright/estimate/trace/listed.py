"""What experts that are modules in a list compute and send, where the router is balanced."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod

from shardwright.distributed.axes import EXPERTS
from shardwright.distributed.models.huggingface import experts_per_token
from shardwright.distributed.planning.decided import Experts, Listed
from shardwright.distributed.planning.layout import ParameterLayout
from shardwright.distributed.planning.listed_experts import listed_experts
from shardwright.estimate.subject import Subject
from shardwright.estimate.trace.kernels import Sending

_COUNT = 8  # bytes of a count


@dataclass(frozen=True)
class ListedLoad:
    """A list of experts on one rank.

    Attributes:
        name: of the list.
        held: the names of the experts that the rank computes.
        rows: how many tokens each of them gets, from all ranks.
        forward: what the rank sends in forward.
        backward: the same in backward.
        brought: bytes of the weights that come to the rank.
    """

    name: str
    held: tuple[str, ...]
    rows: int
    forward: Counter[Sending]
    backward: Counter[Sending]
    brought: int = 0

    def has(self, layout: ParameterLayout) -> bool:
        """Whether a parameter belongs to one of its experts."""
        return f"{layout.module}.".startswith(f"{self.name}.")

    def computes(self, layout: ParameterLayout) -> bool:
        """Whether it belongs to one that the rank computes."""
        return f"{layout.module}.".startswith(tuple(f"{name}." for name in self.held))


def listed_loads(subject: Subject, tokens: int) -> list[ListedLoad]:
    """The lists of a model, for so many tokens on a rank. Each expert gets equally many, as the config says."""
    plan, found = subject.decided.experts, []
    for each in listed_experts(subject.reading):
        names = tuple(f"{each.name}.{name}" for name in each.names)
        choices = tokens * (experts_per_token(subject.reading.model) or each.count)
        if plan is None:
            found.append(ListedLoad(each.name, names, -(-choices // each.count), Counter(), Counter()))
            continue
        experts = plan.modules[each.name]
        assert experts.listed is not None
        held = names[: -(-each.count // plan.ep)]
        weights = _own_bytes(subject, each.name)
        forward = _sent(subject, experts, experts.listed, choices // subject.config.tp, weights)
        backward = Counter({sending: count for sending, count in forward.items() if sending.kind == "all_to_all"})
        rows = -(-choices * plan.ep // (each.count * subject.config.tp))
        found.append(ListedLoad(each.name, held, rows, forward, backward, weights))
    return found


def _own_bytes(subject: Subject, name: str) -> int:
    """Bytes of what a rank has of all experts of a list, which are those of its own experts, whole."""
    inside = (layout for layout in subject.layouts if f"{layout.module}.".startswith(f"{name}."))
    return sum(layout.gathered_numel for layout in inside) * subject.compute.itemsize


def _sent(subject: Subject, experts: Experts, listed: Listed, rows: int, weights: int) -> Counter[Sending]:
    """Counts, weights, every tensor that experts are called with, and their results."""
    tails = listed.called.tails
    told = (2 * experts.count + len(tails) + 1) * _COUNT * subject.config.ep
    sizes = [weights, *(rows * prod(tail) * subject.compute.itemsize for tail in (*tails, tails[0]))]
    return Counter([Sending("all_gather", told, EXPERTS), *(Sending("all_to_all", size, EXPERTS) for size in sizes)])
