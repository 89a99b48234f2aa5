"""Losses that never make whole logits: on one device, and on sharded models of every kind.

They take the last hidden states and the head's weight, and compute the logits and the loss a tile of tokens at a time:

    hidden = model.model(input_ids=ids).last_hidden_state
    loss = linear_cross_entropy(hidden, model.lm_head.weight, labels, shift=True, tiles=16)
    loss.backward()

``model(input_ids=ids, labels=labels).loss`` does the same with ``ParallelConfig(loss_tiles=16)``, and so does any loss
that is computed from logits inside of the model's call:

    loss = call_with_loss(model, lambda output: F.cross_entropy(output.logits.flatten(0, 1), targets), input_ids=ids)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwright.distributed.apply.loss_tiles import call_with_loss
from shardwright.distributed.runtime.context.parts import part, summed, used_in_part
from shardwright.distributed.runtime.context.sharded import ContextSharded
from shardwright.distributed.runtime.implicit import joined
from shardwright.distributed.runtime.read_weights import readable
from shardwright.distributed.runtime.sharded_table import bias_of, by_rows, logits_of, slice_of, whole_input
from shardwright.distributed.runtime.tiles import in_tiles
from shardwright.errors import ConfigError

__all__ = ["call_with_loss", "linear_cross_entropy", "loss_in_tiles"]

IGNORED = -100


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    shift: bool = False,
    ignore_index: int = IGNORED,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    on_logits: Callable[[Tensor], Tensor] | None = None,
    dtype: torch.dtype | None = None,
    tiles: int = 8,
) -> Tensor:
    """``F.cross_entropy`` of ``hidden @ weight.T + bias`` in float32, a tile of tokens at a time. Exact.

    Args:
        hidden: ``[..., features]``; equal on the ranks of a tensor-parallel group.
        weight: ``[vocabulary, features]``: ``model.lm_head.weight``, sharded or not. Where data-parallel ranks hold
            parts of it, this call is one gather among them, and its backward one reduction that averages the gradient.
        labels: ``[...]``, entries of the vocabulary, or ``ignore_index``.
        bias: ``[vocabulary]``.
        shift: the label of a position is the next one's, as in ``model(labels=...)``.
        reduction: ``"mean"`` over the labels that count, ``"sum"``, or ``"none"``: ``[...]``, in float32.
        on_logits: what the model does to its logits (``lambda x: 30 * torch.tanh(x / 30)``), to each by itself.
        dtype: of the product; None takes that of ``hidden``.
        tiles: into how many tiles the tokens are cut. Ranks of a tensor-parallel group must give the same number.

    Raises:
        ConfigError: shapes that do not go together, or values that are not allowed.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ConfigError(f"reduction is {reduction!r}; it must be mean, sum or none.")
    if labels.shape != hidden.shape[:-1]:
        raise ConfigError(f"labels of shape {tuple(labels.shape)} do not fit hidden states {tuple(hidden.shape)}.")
    if shift:
        labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    loss = partial(_token_losses, ignore_index=ignore_index, label_smoothing=label_smoothing)
    losses = loss_in_tiles(loss, hidden, weight, labels, bias=bias, on_logits=on_logits, dtype=dtype, tiles=tiles)
    if reduction == "none":
        return losses
    return losses.sum() / (labels != ignore_index).sum() if reduction == "mean" else losses.sum()


def _token_losses(logits: Tensor, labels: Tensor, *, ignore_index: int, label_smoothing: float) -> Tensor:
    return F.cross_entropy(
        logits.float(), labels, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )


def loss_in_tiles(
    loss: Callable[..., Tensor],
    hidden: Tensor,
    weight: Tensor,
    *per_token: Tensor,
    bias: Tensor | None = None,
    on_logits: Callable[[Tensor], Tensor] | None = None,
    dtype: torch.dtype | None = None,
    tiles: int = 8,
) -> Tensor:
    """A loss of your own, computed from the logits of a tile of tokens at a time.

    Args:
        loss: called with the logits ``[tokens, vocabulary]`` of a tile (sharded on the vocabulary under tensor
            parallelism; ``F.cross_entropy``, ``log_softmax``, ``gather``, ``logsumexp`` and the like compute on the
            shards) and with the tile's part of every tensor in ``per_token``. Returns a value for each token, or one
            number for the tile. Backward calls it a second time.
        hidden: ``[..., features]``.
        weight: as for :func:`linear_cross_entropy`, and so are ``bias``, ``on_logits``, ``dtype`` and ``tiles``.
        per_token: tensors ``[..., *]`` with the leading dims of ``hidden``: labels, advantages, log-probabilities.

    Returns:
        ``[..., *]`` with the leading dims of ``hidden`` where ``loss`` returns a value for each token; else the sum of
        what it returned.
    """
    if isinstance(tiles, bool) or not isinstance(tiles, int) or tiles < 1:
        raise ConfigError(f"tiles is {tiles!r}; it must be a whole number >= 1.")
    dtype = dtype or hidden.dtype
    leading = hidden.shape[:-1]
    table = by_rows(readable(weight, dtype))
    dealt = hidden if isinstance(hidden, ContextSharded) else None  # each rank computes the losses of its part
    mine = hidden if dealt is None else dealt.inside
    rows = [whole_input(mine, table).to(dtype).reshape(-1, hidden.shape[-1])]
    for tensor in per_token:
        if tensor.shape[: len(leading)] != leading:
            raise ConfigError(f"A tensor of shape {tuple(tensor.shape)} has no value per token of {tuple(leading)}.")
        values = joined(tensor) if dealt is None else part(joined(tensor), dealt.dealt)
        rows.append(values.reshape(rows[0].shape[0], *tensor.shape[len(leading) :]))
    weights = {"weight": slice_of(table)}
    if bias is not None:
        weights["bias"] = bias_of(readable(bias, dtype), table)

    if dealt is not None:
        weights = {name: used_in_part(x, dealt.dealt) for name, x in weights.items()}

    def tile(pieces: Sequence[Tensor], weights: Mapping[str, Tensor]) -> Tensor:
        logits = logits_of(F.linear(pieces[0], weights["weight"], weights.get("bias")), table)
        return loss(logits if on_logits is None else on_logits(logits), *pieces[1:])

    found = in_tiles(tile, rows, weights, tiles)
    if found[0].ndim == 0:
        total = torch.stack(found).sum()
        return total if dealt is None else summed(total, dealt.dealt)
    values = torch.cat(found).reshape(*mine.shape[:-1], *found[0].shape[1:])
    return values if dealt is None else dealt.like(values, dealt.dealt)
