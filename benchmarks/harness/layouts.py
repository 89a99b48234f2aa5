"""How a contender is asked to spread a model, as plain data that every interpreter understands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Layout:
    """Degrees and switches; float32 throughout.

    Attributes:
        tp: tensor-parallel ranks.
        dp: data-parallel ranks, over which FSDP2 shards.
        cp: context-parallel ranks: each has a chunk of the sequence, and FSDP2 shards over them too.
        ep: expert-parallel ranks, which are among those of ``dp`` and ``tp``.
        sequence_parallel: the residual stream is split along the sequence over the ``tp`` ranks.
        activation_checkpointing: every block is recomputed in backward.
    """

    tp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    sequence_parallel: bool = False
    activation_checkpointing: bool = False

    @property
    def ranks(self) -> int:
        return self.tp * self.dp * self.cp

    @property
    def title(self) -> str:
        degrees = {"TP": self.tp, "FSDP2": self.dp, "CP": self.cp, "EP": self.ep}
        parts = [f"{name} {degree}" for name, degree in degrees.items() if degree > 1]
        return " x ".join(parts) + " + SP" * self.sequence_parallel


class NotOfferedError(RuntimeError):
    """The peer has no such thing, by its own documentation."""


@dataclass
class Sharded:
    """A model that a contender has spread over the ranks.

    Attributes:
        model: for its parameters.
        backward: forward and backward of one batch; returns the loss.
    """

    model: Any
    backward: Callable[[Mapping[str, Any]], Any]


def plain_backward(model: Any) -> Callable[[Mapping[str, Any]], Any]:
    """What a user writes: ``model(**batch).loss.backward()``."""

    def backward(batch: Mapping[str, Any]) -> Any:
        loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    return backward
