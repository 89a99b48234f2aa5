"""Attention on a part of the sequence, with the model's own kernel.

A model's attention module computes queries, keys and values of its part of the sequence and asks for the function that
is called by a :class:`KernelName`. That gathers the keys and values, or those that are looked at (:mod:`.reach`), picks
this rank's rows of the mask, and calls the kernel that the model would have called; or it exchanges parts of the
sequence for parts of the heads (:mod:`.heads`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias, CausalVariant

from shardwright._torch import without_dispatch_modes
from shardwright.distributed.runtime.context import parts
from shardwright.distributed.runtime.context.base import Context
from shardwright.distributed.runtime.context.heads import Kernel, attend_by_heads
from shardwright.distributed.runtime.context.reach import fetched, with_all_keys
from shardwright.distributed.runtime.context.sharded import context_sharded
from shardwright.distributed.runtime.forward import Around, Forward
from shardwright.distributed.runtime.local_sizes import LocalSizes
from shardwright.errors import UnsupportedError

HOLDER = "_context_attention"
CAUSAL_WITHOUT_MASK = "sdpa"  # the kernel that takes no mask for a causal one
KERNELS = frozenset({CAUSAL_WITHOUT_MASK, "eager"})  # those whose masks this file knows


class KernelName(str):
    """What a config calls its attention function while it stands for :func:`context_attention`.

    It is equal to the kernel's name, so that code which asks for that (``if name == "eager"``) does what it did. In a
    table it is another key: its hash differs.
    """

    __slots__ = ()

    def __hash__(self) -> int:
        return hash(("context", str(self)))

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True

    def __reduce__(self) -> Any:
        return KernelName, (str(self),)


def context_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Any]:
    """What modules call. Shapes as in transformers: ``[batch, heads, positions, size]``, out with positions first."""
    return module.__dict__[HOLDER].attend(module, query, key, value, attention_mask, kwargs)


class ContextAttention(Around):
    """An attention module whose queries are of this rank's part.

    Args:
        kernel: the function that the module calls otherwise.
        name: what that is called.
        own_keys: whether the keys are of the module's part, too; else they are of all positions of something else.
        by_heads: exchange parts of the sequence for parts of the heads, rather than gather keys and values.
        all_keys: whether the kernel must see all keys, those that no query of this rank looks at among them.
    """

    def __init__(
        self,
        module: nn.Module,
        context: Context,
        kernel: Kernel,
        name: str,
        *,
        own_keys: bool,
        by_heads: bool = False,
        all_keys: bool = False,
    ) -> None:
        self.context, self.kernel, self.name = context, kernel, name
        self.own_keys, self.by_heads, self.all_keys = own_keys, by_heads, all_keys
        self.asking = LocalSizes(module, {"config._attn_implementation": KernelName(name)})

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.context.split is None:
            return forward(*args, **kwargs)
        with self.asking.on(module):
            return forward(*args, **kwargs)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Any]:
        split = self.context.split
        assert split is not None, "asked for inside of a block that is split"
        split = split.at(2)
        if self.by_heads:
            return attend_by_heads(self.kernel, module, query, key, value, mask, kwargs, split), None
        keys = None
        if self.own_keys:
            reach = None if self.all_keys else self.context.reach(mask, kwargs, split)
            keys = None if reach is None else reach[split.group.rank]
            key, value = _together(key, value, split, parts.whole if reach is None else partial(fetched, reach=reach))
        out, weights = attend_rows(self.kernel, self.name, module, query, key, value, mask, kwargs, split, keys)
        if weights is not None:
            weights = context_sharded(weights, split, self.context.meshes)
        return out, weights


def _together(
    key: Tensor, value: Tensor, split: parts.Split, bring: Callable[[Tensor, parts.Split], Tensor]
) -> tuple[Tensor, Tensor]:
    """Keys and values as ``bring`` makes them of this rank's part, in one collective where they have one shape.

    Positions come first on the way, as collectives want them, and kernels read what came without a copy.
    """
    if key.shape != value.shape:
        return bring(key, split), bring(value, split)
    mine = torch.stack([x.movedim(split.dim, 0) for x in (key, value)], 1)
    key, value = bring(mine, split.at(0)).unbind(1)
    return key.movedim(0, split.dim), value.movedim(0, split.dim)


def attend_rows(
    kernel: Kernel,
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    kwargs: dict[str, Any],
    split: parts.Split,
    keys: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The rows of the attention that belong to ``query``, this rank's part; the mask is whole.

    The replay uses this function, too.

    Args:
        keys: the positions that ``key`` and ``value`` are of, where there is a mask; None: all.
    """
    start, end = split.mine
    if keys is not None:
        mask = mask[..., start:end, slice(*keys)]
        out, weights = kernel(module, query, key, value, mask, **kwargs)
        return out, None if weights is None else with_all_keys(weights, keys, split.length)
    kwargs = {item: _rows(x, split.length, start, end) for item, x in kwargs.items()}
    if mask is None and name == CAUSAL_WITHOUT_MASK and _is_causal(module, kwargs):
        key, value = key[:, :, :end], value[:, :, :end]
        bias = kwargs.get("position_bias")
        if bias is None:
            return _causal(query, key, value, kwargs), None
        kwargs["position_bias"] = bias[..., :end]
        mask = torch.ones(end - start, end, dtype=torch.bool, device=query.device).tril(start)
    elif mask is not None:
        mask = _mask_rows(mask, split.length, start, end)
    return kernel(module, query, key, value, mask, **kwargs)


def _causal(query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Causal attention of the last queries, without a mask where torch has a kernel for that: positions first.

    Grouped keys and values are not repeated, as transformers would where it is given a mask.
    """
    groups = query.shape[1] // key.shape[1]
    grouped = groups > 1 and key.shape[-1] == value.shape[-1]
    if groups > 1 and not grouped:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=last_queries(query.shape[2], key.shape[2]),
        dropout_p=kwargs.get("dropout", 0.0),
        scale=kwargs.get("scaling"),
        enable_gqa=grouped,
    )
    return out.transpose(1, 2).contiguous()


def last_queries(queries: int, keys: int) -> CausalBias:
    """``torch.nn.attention.bias.causal_lower_right`` in no memory.

    Torch's function takes memory for ``queries`` x ``keys`` numbers that nobody reads, and fails inside of a dispatch
    mode (selective checkpointing is one).
    """
    with without_dispatch_modes():
        bias = torch.empty(0).as_subclass(CausalBias)
    bias.variant, bias.seq_len_q, bias.seq_len_kv = CausalVariant.LOWER_RIGHT, queries, keys
    return bias


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """As transformers' function for ``F.scaled_dot_product_attention`` decides it."""
    told = kwargs.get("is_causal")
    return bool(module.__dict__.get("is_causal", True) if told is None else told)


def _mask_rows(mask: Any, length: int, start: int, end: int) -> Tensor:
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[-2] not in (1, length):
        form = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedError(
            f"An attention mask of the form {form} came to a layer with {length} queries under context parallelism, "
            f"which knows masks of the shape [batch, heads, {length}, keys]. Pass the model a padding mask [batch, "
            "positions] or a mask of that shape."
        )
    return mask if mask.shape[-2] == 1 else mask[..., start:end, :]


def _rows(x: Any, length: int, start: int, end: int) -> Any:
    """This rank's rows of what has a row for every query (a bias of relative positions); anything else as it is."""
    if isinstance(x, Tensor) and x.ndim > 2 and x.shape[-2] == length and x.shape[-1] >= length:
        return x[..., start:end, :]
    return x
