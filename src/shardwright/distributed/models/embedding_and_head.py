"""The two ends of a model outside of its blocks: the input embedding and the head."""

from __future__ import annotations

from torch import nn

from shardwright.distributed.models.huggingface import embedding_name, head_name
from shardwright.distributed.models.ties import find_ties
from shardwright.errors import PlanError


def embedding_and_head_names(model: nn.Module) -> list[str]:
    """The names of the input embedding and of the head, where each can be gathered when it runs, and freed.

    Raises:
        PlanError: the model does not say which they are, or their weights are needed elsewhere too.
    """
    embedding, head = embedding_name(model), head_name(model)
    if embedding is None or head is None:
        missing = "input embedding" if embedding is None else "head"
        raise PlanError(
            f"shard_ends needs the {missing} of {type(model).__name__}, which it does not tell (get_input_embeddings, "
            "get_output_embeddings). Leave shard_ends out."
        )
    for tie in find_ties(model):
        if any(module in (embedding, head) for module, _ in tie.places):
            raise PlanError(
                f"shard_ends frees {embedding} and {head} when they have run, but {' and '.join(tie.names)} are one "
                "parameter, which the model needs from its first step to its last. Leave shard_ends out."
            )
    return [embedding, head]
