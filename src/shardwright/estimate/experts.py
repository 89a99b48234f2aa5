"""What experts on ranks of their own mean for a reader: who holds which, and what travels."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from shardwright.distributed.models.blocks import numbers_to_globs
from shardwright.distributed.models.huggingface import experts_per_token
from shardwright.distributed.planning.decided import ExpertPlan, Experts
from shardwright.distributed.replay.reading import ModelReading

EXCHANGES = 4  # of tokens: there and back, forward and backward


def expert_notes(reading: ModelReading, plan: ExpertPlan | None, itemsize: int) -> list[str]:
    """Sentences on every kind of module with experts.

    Args:
        itemsize: bytes of the dtype that tokens travel in.
    """
    if plan is None:
        return []
    kinds: dict[tuple[str, int], list[str]] = {}
    for name, experts in plan.modules.items():
        kinds.setdefault((numbers_to_globs(name), experts.count), []).append(name)
    found: list[str] = []
    for (glob, count), names in kinds.items():
        found += _notes(glob, count, len(names), plan.ep, bytes_per_token(reading, plan, names[0], itemsize))
        if plan.modules[names[0]].listed is not None:
            found.append(_note_on_weights(glob, weight_bytes(reading, plan, names[0], itemsize)))
    return found


def _note_on_weights(glob: str, received: float) -> str:
    return (
        f"{glob}: these experts are modules of their own. Between steps every rank has a slice of each, and in a "
        f"micro-batch each exchange brings a rank {received / 2**20:.3g} MiB of its experts' weights from the other "
        "ranks of ep, and takes their gradients back."
    )


def weight_bytes(reading: ModelReading, plan: ExpertPlan, name: str, itemsize: int) -> float:
    """Bytes of weights that the other ranks send to the first one for a list of experts."""
    experts = plan.modules[name]
    each = sum(param.numel() for param in reading.modules[name].parameters()) / experts.count
    return each * -(-experts.count // plan.ep) * itemsize * (plan.ep - 1) / plan.ep


def _notes(glob: str, count: int, layers: int, ep: int, sent: float) -> Iterable[str]:
    each = -(-count // ep)
    last = count - each * (ep - 1)
    held = f"{each} on each" if last == each else f"{each} on each but the last, which has {last}"
    yield (
        f"{glob} ({layers} x): its {count} experts lie on {ep} ranks, {held}: rank 0 of ep holds 0 to {each - 1}, the "
        f"last {count - last} to {count - 1}."
    )
    yield (
        f"{glob}: in a micro-batch each of the {layers} exchanges counts once and tokens {EXCHANGES} times, half of "
        f"them in backward. A rank sends {sent / 1024:.3g} KiB per token in each, where the router is balanced."
    )


def bytes_per_token(reading: ModelReading, plan: ExpertPlan, name: str, itemsize: int) -> float:
    """Bytes that a rank sends per token in one exchange of a module, to the other ranks, from a balanced router."""
    experts = plan.modules[name]
    choices = experts.count if experts.kind == "alike" else experts_per_token(reading.model)
    return choices * _width(reading, name, experts) * itemsize * (plan.ep - 1) / plan.ep


def _width(reading: ModelReading, name: str, experts: Experts) -> int:
    """The width of the tokens: the one that the matrices of an expert have in common."""
    if experts.listed is not None:
        return prod(experts.listed.called.tails[0])
    shapes = [reading.modules[name].get_parameter(own).shape for own in experts.parameters]
    matrices = [shape[1:] for shape in shapes if len(shape) > 1 and shape[-1] > 1]
    matrices = [shape for shape in matrices if len(shape) == max(map(len, matrices))]
    common = set.intersection(*(set(shape) for shape in matrices))
    return common.pop() if len(common) == 1 else matrices[0][-1]
