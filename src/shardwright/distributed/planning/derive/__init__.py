"""Plans read off a model's own code: :func:`derive_plan`.

How it reads, in order: a copy without weights and a recorded run of it (:mod:`shardwright.distributed.replay`),
:mod:`.connections` (which layers meet), :mod:`.decide` (how each region is cut), :mod:`.emit` (the plan).
"""

from shardwright.distributed.planning.derive.derive import derive_plan

__all__ = ["derive_plan"]
