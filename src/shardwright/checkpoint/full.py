"""The weights of a sharded model for an inference engine: whole, one after the other, as Hugging Face names them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from shardwright.checkpoint.conversion import plan_save
from shardwright.checkpoint.save import check_ties, skeleton_of
from shardwright.checkpoint.together import same_error_everywhere
from shardwright.distributed.runtime.layout import whole


@torch.no_grad()
def full_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every weight, as in the files that plain transformers would write; of tied weights one.

    Collective: every rank iterates to the end, and gets the same. One weight is whole at a time (one group of weights,
    where they are converted together, such as the experts of one layer), on the device of the model. A value may share
    memory with the model: it is read or copied before the next one, and not written to.

    >>> engine.load_weights(shardwright.full_weights(model))  # on every rank

    Args:
        model: a transformers model, sharded or not.

    Raises:
        UnsupportedError: not a transformers model, or one with adapters; on every rank.
        CheckpointError: weights that the config ties are two; on every rank.
    """
    with same_error_everywhere("Listing the weights"):
        skeleton = skeleton_of(model)
        plan = plan_save(skeleton)
        check_ties(model, skeleton)
    state = model.state_dict()
    for writing in plan.writings:
        yield from writing.convert({name: whole(state[name]) for name in writing.tensors}, skeleton).items()
