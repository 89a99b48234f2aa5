"""What attention is given under context parallelism: all keys and values, or all positions of some heads."""

from __future__ import annotations

from dataclasses import dataclass, replace

from shardwright.distributed.config import CONTEXT_METHODS
from shardwright.distributed.planning.context_plan import SplitAttention
from shardwright.distributed.replay.context_answers import AttentionFinding
from shardwright.errors import PlanError


@dataclass(frozen=True)
class ContextMethod:
    """What was asked for, and among how many ranks heads would be spread.

    Attributes:
        asked: ``"gather"``, ``"ulysses"``, or ``"auto"``: ``"ulysses"`` wherever heads divide, but for windows.
        cp: context-parallel ranks.
        tp: tensor-parallel ranks, which have their heads before.
    """

    asked: str = CONTEXT_METHODS[0]
    cp: int = 2
    tp: int = 1

    def of(self, name: str, kernel: str, found: AttentionFinding) -> SplitAttention:
        """How the module ``name`` attends.

        Raises:
            PlanError: it should exchange heads, and cannot.
        """
        use = SplitAttention(
            kernel, found.own_keys, "gather", "", found.heads, found.key_heads, found.key_size, found.value_size,
            found.all_keys, found.window,
        )  # fmt: skip
        if self.asked == "gather" or not found.own_keys:
            why = "context_method is gather" if found.own_keys else "they come from outside of the block"
            return replace(use, why=why)
        if self.asked == "auto" and use.windowed:
            return replace(use, why="of a long sequence that is less than to exchange heads")
        why_not = found.not_by_heads or self._undivided(found.heads)
        if not why_not:
            return replace(use, method="ulysses", why=f"{found.heads} heads over tp {self.tp} x cp {self.cp}")
        if self.asked == "auto":
            return replace(use, why=f"no exchange of heads: {why_not}")
        raise PlanError(
            f"context_method is ulysses, but {name} cannot attend with some of its heads: {why_not}. Set it to auto "
            "(such layers gather keys and values) or to gather."
        )

    def _undivided(self, heads: int) -> str:
        if heads % (self.tp * self.cp):
            return f"it has {heads} heads, which tp {self.tp} x cp {self.cp} = {self.tp * self.cp} ranks do not divide"
        return ""
