"""Query, key and value projections whose heads the ranks share unevenly, or that are fused into one layer.

transformers' attention modules state the ratio of query to key-value heads as ``num_key_value_groups``, and call
separate projections ``k_proj`` and ``v_proj``.
"""

from __future__ import annotations

from torch import nn

from shardwright.distributed.models.heads import KeyValueShare, share_key_value_heads
from shardwright.distributed.planning.resolved import ResolvedPlan, StyleUse
from shardwright.distributed.replay.reading import ModelReading
from shardwright.distributed.styles.cuts import features_of_rank
from shardwright.distributed.styles.linear import features
from shardwright.errors import PlanError


def share_projections(reading: ModelReading, resolved: ResolvedPlan) -> None:
    """Say which heads each rank computes, where a plain cut of the projections does not."""
    for name in reading.modules:
        _separate(name, reading.modules, resolved)
    for name, use in list(resolved.modules.items()):
        if use.style == "fused_qkv":
            _fused(name, reading, resolved)


def _separate(name: str, modules: dict[str, nn.Module], resolved: ResolvedPlan) -> None:
    """Keep ``k_proj`` and ``v_proj`` of one attention module whole where the ranks do not divide their heads."""
    groups, head_dim = (modules[name].__dict__.get(key) for key in ("num_key_value_groups", "head_dim"))
    key = resolved.modules.get(f"{name}.k_proj")
    if not isinstance(groups, int) or not isinstance(head_dim, int) or key is None or key.style != "colwise":
        return
    count = features(modules[f"{name}.k_proj"], out=True) // head_dim
    if count % resolved.tp == 0:
        return
    share = share_key_value_heads(groups * count, count, resolved.tp)
    for part in (f"{name}.k_proj", f"{name}.v_proj"):
        use = resolved.modules.get(part)
        if use is not None and use.style == "colwise":
            resolved.modules[part] = StyleUse("kv_heads", {"count": count, "heads": share.heads}, rule=use.rule)
    resolved.attributes[name] = {"num_key_value_groups": share.groups}


def _fused(name: str, reading: ModelReading, resolved: ResolvedPlan) -> None:
    """Blocks q|k|v in one layer: cut piece by piece where they are equal, else gathered and picked by head."""
    counts, tp, use = reading.heads, resolved.tp, resolved.modules[name]
    if blocks := use.options.get("blocks"):
        heads = tuple(features_of_rank(blocks, rank, tp) for rank in range(tp))
        resolved.modules[name] = StyleUse("fused_qkv", {"heads": heads}, rule=use.rule)
        return
    width = features(reading.modules[name], out=True)
    if counts is None or len(counts.layers) != 1 or width % (counts.layers[0][0] + 2 * counts.layers[0][1]):
        raise PlanError(
            f"{name} has the style 'fused_qkv', but its width {width} is not (query + 2 x key-value heads) x head size "
            f"for the head counts in the model's config ({counts and counts.layers})."
        )
    query, key_value = counts.layers[0]
    if query == key_value and key_value % tp == 0:
        resolved.modules[name] = StyleUse("packed_colwise", {"pieces": 3}, rule=use.rule)
        return
    share = _shares(query, key_value, tp)
    head_dim = width // (query + 2 * key_value)
    picked = tuple(
        tuple(
            head * head_dim + feature
            for head in (
                *range(rank * query // tp, (rank + 1) * query // tp),
                *(query + head for head in share.heads[rank]),
                *(query + key_value + head for head in share.heads[rank]),
            )
            for feature in range(head_dim)
        )
        for rank in range(tp)
    )
    resolved.modules[name] = StyleUse("fused_qkv", {"heads": picked}, rule=use.rule)
    if key_value % tp:
        local = {"num_key_value_heads": len(share.heads[0]), "num_key_value_groups": share.groups}
        resolved.attributes.setdefault(name.rpartition(".")[0], {}).update(local)


def _shares(query: int, key_value: int, tp: int) -> KeyValueShare:
    if key_value % tp:
        return share_key_value_heads(query, key_value, tp)
    each = key_value // tp
    heads = tuple(tuple(range(rank * each, (rank + 1) * each)) for rank in range(tp))
    return KeyValueShare(heads, query // key_value)
