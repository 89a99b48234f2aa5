"""Attention heads against the tensor-parallel size.

Where there are fewer key-value heads than ranks, or the ranks do not divide them, the key and value projections stay
whole and every rank computes those heads that its query heads attend with. Query heads must divide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

from torch import nn

from shardwright.distributed.models.huggingface import text_config
from shardwright.errors import PlanError, sizes_that_work

QUERY_KEYS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
KEY_VALUE_KEYS = ("num_key_value_heads", "num_attention_groups", "multi_query_group_num")


@dataclass(frozen=True)
class HeadCounts:
    """Distinct (query heads, key-value heads) of a model's layers."""

    layers: tuple[tuple[int, int], ...]

    @property
    def largest_tp(self) -> int:
        """The largest size that divides every layer's query heads."""
        return gcd(*(query for query, _ in self.layers))


def head_counts(model: nn.Module) -> HeadCounts | None:
    """The head counts that the text model's config states; None where there are none (no config, no attention)."""
    pairs = dict.fromkeys(pair for config in _layer_configs(text_config(model)) for pair in _pairs(config))
    return HeadCounts(tuple(pairs)) if pairs else None


def _layer_configs(config: Any) -> Sequence[Any]:
    """A config for each layer where they differ, which only transformers' heterogeneous models have; else the one."""
    return config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]


def _pairs(config: Any) -> list[tuple[int, int]]:
    query = _per_layer(config, QUERY_KEYS)
    key_value = _per_layer(config, KEY_VALUE_KEYS) or query
    if len(query) != len(key_value):
        longest = max(len(query), len(key_value))
        query, key_value = (values * longest if len(values) == 1 else values for values in (query, key_value))
    return list(zip(query, key_value, strict=False))


def _per_layer(config: Any, keys: tuple[str, ...]) -> tuple[int, ...]:
    for key in keys:
        value = getattr(config, key, None)
        if isinstance(value, int) and value > 0:
            return (value,)
        if isinstance(value, Sequence) and value and all(isinstance(item, int) for item in value):
            return tuple(item for item in value if item > 0)
    return ()


def check_heads(model: nn.Module, tp: int, name: str = "") -> str | None:
    """Whether ``tp`` ranks can share the model's heads.

    Returns:
        A sentence for the report where key-value heads have to be repeated, else None.

    Raises:
        PlanError: they cannot; the message has the counts and the sizes that work.
    """
    counts = head_counts(model)
    if counts is None or tp == 1:
        return None
    for query, key_value in counts.layers:
        if query % tp:
            raise PlanError(
                f"{name or type(model).__name__} has {query} attention heads ({key_value} key-value heads), which "
                f"tp={tp} does not divide. {sizes_that_work(counts.largest_tp, tp)} (Of num_attention_heads and "
                "num_key_value_heads in the config, only the former must be divisible by the TP size.)"
            )
    for _, key_value in counts.layers:
        if key_value % tp:
            return (
                f"{key_value} key-value heads on {tp} tensor-parallel ranks: the key and value projections stay whole, "
                "and each rank computes the heads that its query heads need."
            )
    return None


@dataclass(frozen=True)
class KeyValueShare:
    """Which key-value heads each rank computes, and how many of its query heads use each."""

    heads: tuple[tuple[int, ...], ...]
    groups: int


def share_key_value_heads(query: int, key_value: int, tp: int) -> KeyValueShare:
    """The key-value heads of every rank when ``tp`` does not divide ``key_value``.

    Rank ``r`` has query heads ``r * query / tp`` and following; query head ``q`` attends with key-value head
    ``q // (query / key_value)``. A head is listed once per run of ``groups`` query heads that use it.
    """
    per_rank, per_head = query // tp, query // key_value
    groups = gcd(per_rank, per_head)
    starts = range(0, per_rank, groups)
    return KeyValueShare(
        tuple(tuple((rank * per_rank + start) // per_head for start in starts) for rank in range(tp)), groups
    )
