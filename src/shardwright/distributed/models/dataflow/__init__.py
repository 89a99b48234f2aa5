"""Plans read off a model's own code: :func:`derive_plan`.

How it reads, in order: :mod:`.hollow` (a copy without weights), :mod:`.inputs`, :mod:`.play` (the model in full, then
rank by rank), :mod:`.regions` (which layers meet), :mod:`.decide` (how each region is cut), :mod:`.emit` (the plan).
"""

from shardwright.distributed.models.dataflow.derive import derive_plan

__all__ = ["derive_plan"]
