"""The input embedding and the head as units of their own."""

from __future__ import annotations

from shardwright.distributed.replay.reading import ModelReading
from shardwright.errors import PlanError


def embedding_and_head_names(reading: ModelReading) -> list[str]:
    """The names of the input embedding and of the head, where each can be gathered when it runs, and freed.

    Raises:
        PlanError: the model does not say which they are, or their weights are needed elsewhere too.
    """
    embedding, head = reading.embedding, reading.head
    if embedding is None or head is None:
        missing = "input embedding" if embedding is None else "head"
        raise PlanError(
            f"shard_ends needs the {missing} of {type(reading.model).__name__}, which it does not tell "
            "(get_input_embeddings, get_output_embeddings). Leave shard_ends out."
        )
    for tie in reading.ties:
        if any(module in (embedding, head) for module, _ in tie.places):
            raise PlanError(
                f"shard_ends frees {embedding} and {head} when they have run, but {' and '.join(tie.names)} are one "
                "parameter, which the model needs from its first step to its last. Leave shard_ends out."
            )
    return [embedding, head]
