"""Experts that are modules of their own in a list, which a model's code calls one after another.

Mixtral's code was written so before transformers 5, DeepSeek's is where it comes with the weights, and so are many
models that are written by hand. They are found by their structure, to be refused by name: each expert's weights are
parameters of their own, which DTensor can cut over all ranks of an axis, but not leave to one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from shardwright.distributed.models.blocks import numbers_to_globs
from shardwright.distributed.replay.reading import ModelReading


@dataclass(frozen=True)
class ListedExperts:
    """A list of experts.

    Attributes:
        name: of the list.
        names: of the experts in it.
        expert: the class of each.
        caller: the class of the module around the list, whose code calls them.
    """

    name: str
    names: tuple[str, ...]
    expert: str
    caller: str

    @property
    def count(self) -> int:
        """How many experts it has."""
        return len(self.names)

    def why_not(self, ep: int, reason: str) -> str:
        """Why they cannot be spread over ``ep`` ranks, and what to do."""
        return (
            f"ep is {ep}, but the {self.count} experts of {numbers_to_globs(self.name)} ({self.expert}), which "
            f"{self.caller} calls one after another, cannot be computed on ranks of their own: {reason}. Nothing was "
            "changed. Leave ep out: tp and FSDP2 shard each of these experts as any other layers, exactly. Or use the "
            "class that transformers has for this architecture (trust_remote_code=False), which stacks the same "
            "weights when it loads them."
        )


def listed_experts(reading: ModelReading) -> list[ListedExperts]:
    """The lists of experts of a model.

    A list of experts is a container of several modules that are built alike and hold matrices, beside a router: a
    matrix with a row (or a column) for each of them.
    """
    return [
        ListedExperts(name, tuple(experts), type(next(iter(experts.values()))).__name__, type(around[0]).__name__)
        for name, module in reading.modules.items()
        if (experts := _alike(module))
        and (around := _around(reading, name))
        and not any(block.startswith(f"{name}.") for block in reading.blocks)
        and any(_routes_to(len(experts), module, owner) for owner in around)
    ]


def _alike(module: nn.Module) -> dict[str, nn.Module]:
    """The children of a container that have parameters, where they are several, built alike, and hold matrices.

    A list may have a forward, and modules without parameters for it (NLLB-MoE's dropout).
    """
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return {}
    children = {name: child for name, child in module.named_children() if any(True for _ in child.parameters())}
    built = {
        (type(child), tuple((name, param.shape) for name, param in child.named_parameters()))
        for child in children.values()
    }
    matrices = len(built) == 1 and any(len(shape) > 1 for _, shapes in built for _, shape in shapes)
    return children if len(children) > 1 and matrices else {}


def _around(reading: ModelReading, name: str) -> list[nn.Module]:
    """The module around the list called ``name``, and the one around that: some keep the router there.

    The whole model is no such module, unless the list is its own: any matrix could be in it.
    """
    parents = list(_parents(name))[:2]
    return [reading.modules[each] for each in parents if each or len(parents) == 1]


def _parents(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name


def _routes_to(count: int, experts: nn.Module, owner: nn.Module) -> bool:
    """Whether ``owner`` has a matrix with a row or a column for each expert, outside of them."""
    inside = {id(param) for param in experts.parameters()}
    return any(param.ndim == 2 and count in param.shape for param in owner.parameters() if id(param) not in inside)
