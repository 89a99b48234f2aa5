"""What the styles can execute. A way of running on slices that they cannot is not put into a plan."""

from __future__ import annotations

from dataclasses import dataclass

from shardwright.distributed.replay.cuts import Cut


@dataclass(frozen=True)
class Abilities:
    """Ways of cutting beyond plain slices and equal packed blocks.

    Attributes:
        arguments: arguments that are cut by heads.
        tables: embeddings that hand on a slice of every vector.
        blocks: fused layers of unequal blocks.
    """

    arguments: bool = False
    tables: bool = False
    blocks: bool = False

    def allow(self, cut: Cut, *, table: bool) -> bool:
        """Whether a layer's output can be cut so."""
        equal = len({width for width, _ in cut.blocks}) <= 1 and not any(parts for _, parts in cut.blocks)
        if table:
            return self.tables and equal and len(cut.blocks) <= 1
        return equal or self.blocks


# What the styles of this version do.
AVAILABLE = Abilities(arguments=True, tables=True, blocks=True)
