"""A config of any size to a tiny one of the same architecture.

The rules know the *role* of a field by its name (a width, a number of heads, a layer boundary, a token id), never a
model. What makes an architecture what it is stays: every kind of layer, the ratio of query to key-value heads, ties,
experts and shared experts, biases, norms, positional scheme.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shardwright.verify.layers import LayerChoice

WIDTH = 64
HEAD_DIM = 16
VOCABULARY = 160
POSITIONS = 128
FIRST_FREE_ID = 4  # token ids below it keep their value
LAST_PLAIN_ID = 79  # batches draw from FIRST_FREE_ID..LAST_PLAIN_ID; ids with a meaning come down from VOCABULARY

# What becomes of an integer field, by its name: the first pattern that matches the whole name decides. None keeps it.
Rule = int | Callable[[int], int] | None


def _at_most(limit: int) -> Callable[[int], int]:
    return lambda value: min(value, limit)


def _rules(*pairs: tuple[str, Rule]) -> tuple[tuple[re.Pattern[str], Rule], ...]:
    return tuple((re.compile(pattern), rule) for pattern, rule in pairs)


SIZES = _rules(
    # What a broader pattern below would take for something else.
    (
        r".*(chunk_size_feed_forward|multiple_of|_by|_channels|kernel|conv_L|feature_layer|_cycles|sampling_rate).*",
        None,
    ),
    (r".*(num_labels|type_vocab_size|merge_size|patch_size|stride|_types|factor|predict_layers|mtp|keep).*", None),
    (r".*(seed|_idx|_iters|hc_mult|hc_count|_ratio|scale_emb)", None),
    # Tokens and positions.
    (r".*(vocab_size|codebook_size|group_vocab|num_embeddings)(_.*)?", VOCABULARY),
    (
        r"(max_position_embeddings|n_positions|max_seq_len|n_ctx|context_length|model_max_length|max_\w+_positions)",
        POSITIONS,
    ),
    (r"original_max_position_embeddings", POSITIONS // 2),
    (r"((max_)?(image|img)_size|resolution|crop_size)", _at_most(32)),
    (r".*(sliding_window(_size)?|attention_(chunk|window)_size|local_attention|window_len)", _at_most(8)),
    (r"index_topk(_blocks)?", _at_most(4)),
    (r"(mamba_)?chunk_size|block_size|index_block_size", _at_most(4)),
    # Experts.
    (r"(moe_)?(num|n)_(local_|routed_)?experts", _at_most(8)),
    (r"(moe_)?num_experts_per_tok(en)?|moe_top_?k|moe_k|moe_top_k", _at_most(2)),
    (r"zero_expert_num", 4),
    (r"n_group|num_expert_group", _at_most(2)),
    (r"topk_group", _at_most(1)),
    (r".*(moe|expert|shared).*(intermediate|ffn).*|moe_hidden_size", 32),
    # What a head is made of.
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"qk_head_dim", HEAD_DIM + 8),
    (r"kv_lora_rank", 24),
    (r"[qo]_lora_rank", 32),
    (r".*(head_dim|head_size|dim_head|kv_channels|d_head|d_kv|headdim)", HEAD_DIM),
    (r".*(_rank|lowrank)", 8),
    # The rest of the widths.
    (r".*(intermediate|ffn|mlp)_?(hidden_|multiple_)?(size|dim)(_mlp)?|d_inner|dim_ff|dff|d_ff|n_inner", 96),
    (r"feed_forward_size", 96),
    (r".*(hidden_size|d_model|embed_dim|embedding_(size|dim)|hidden_dim|proj_dim|projection_dim)", WIDTH),
    (r"n_embd|dim|emb_dim|width|output_dim|projector_(in|out)put_dim|lru_width", WIDTH),
)

HEADS = re.compile(r".*(attention_heads|num_heads|n_heads?|attention_heads_per_layer|mamba_heads)")
KV_HEADS = re.compile(r".*(key_value_heads?|kv_heads|kv_n_heads|key_heads)")
TOKEN_ID = re.compile(r".*(token_ids?|token_index(es)?|(im|patch)_\w*id|image_patch_id)")
DROPOUT = re.compile(r".*(dropout|drop_path|drop_rate|droprate|pdrop|layerdrop|jitter).*")


def shrink(config: Mapping[str, Any], tp: int = 2) -> dict[str, Any]:
    """The tiny config with the architecture of ``config`` (a config's ``to_dict()``, nested ones included).

    Args:
        config: plain data, not changed.
        tp: ranks the tiny model will be tensor-parallel over: heads that it divides stay divisible by it.
    """
    return _Shrinker(tp).mapping(dict(config))


@dataclass
class _Shrinker:
    tp: int
    ids: dict[int, int] = field(default_factory=dict)  # the same old token id is the same new one everywhere

    def mapping(self, config: dict[str, Any]) -> dict[str, Any]:
        layers = LayerChoice.of(config)
        heads = self._heads(config)
        result: dict[str, Any] = {}
        for name, value in config.items():
            if name in layers.changes:
                result[name] = self._values(name, layers.changes[name])
            elif name in heads:
                result[name] = heads[name]
            elif isinstance(value, dict):
                result[name] = value if name in ("id2label", "label2id") else self.mapping(value)
            else:
                result[name] = self._values(name, value)
        return result

    def _values(self, name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._values(name, item) for item in value]
        if DROPOUT.fullmatch(name) and isinstance(value, (int, float)):
            return 0.0
        if isinstance(value, bool) or not isinstance(value, int):
            return value
        if TOKEN_ID.fullmatch(name):
            return self._token_id(value)
        rule = next((rule for pattern, rule in SIZES if pattern.fullmatch(name)), None)
        if rule is None or value <= 0:
            return value
        return rule(value) if callable(rule) else rule

    def _token_id(self, value: int) -> int:
        if value < FIRST_FREE_ID:
            return value
        return self.ids.setdefault(value, VOCABULARY - 1 - len(self.ids))

    def _heads(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """New head counts for the fields of one config that count heads."""
        counts = {n: v for n, v in config.items() if HEADS.fullmatch(n) and type(v) is int}
        kv_counts = {n: v for n, v in config.items() if KV_HEADS.fullmatch(n) and type(v) is int}
        result: dict[str, Any] = {}
        for name, old in counts.items():
            prefix = name.partition("num_")[0]
            kv_name = next((n for n in kv_counts if n.partition("num_")[0] == prefix or len(kv_counts) == 1), None)
            old_kv = old if kv_name is None else kv_counts[kv_name]
            heads, kv_heads = self._head_pair(old, old_kv)
            if _is_wide(config, old):
                heads *= 2
            result[name] = heads
            if kv_name is not None:
                result[kv_name] = kv_heads
        return result

    def _head_pair(self, heads: int, kv_heads: int) -> tuple[int, int]:
        """A small pair with the same nature: equal, grouped or multi-query; divisible by tp where the old one is."""
        if heads % self.tp or heads % kv_heads:
            return heads, kv_heads
        if heads == kv_heads:
            return max(4, self.tp), max(4, self.tp)
        least = max(2, self.tp)
        small = least if kv_heads % least == 0 else kv_heads
        ratio = next(ratio for ratio in range(2, 2 + self.tp) if small * ratio % self.tp == 0)
        return (small * ratio, small) if small > 1 else (max(4, self.tp), 1)


def _is_wide(config: Mapping[str, Any], heads: int) -> bool:
    """Whether the heads together are wider than the residual stream (a ``head_dim`` of its own, as in Qwen3)."""
    head_dim, width = config.get("head_dim"), config.get("hidden_size")
    return isinstance(head_dim, int) and isinstance(width, int) and heads * head_dim > width
