"""A config of any size to a tiny one of the same architecture.

The rules know the *role* of a field by its name (a width, a number of heads, a layer boundary, a token id), never a
model. What makes an architecture what it is stays: every kind of layer, the ratio of query to key-value heads, ties,
experts and shared experts, biases, norms, positional scheme.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd
from typing import Any

from shardwright.verify.layers import LayerChoice

WIDTH = 64
HEAD_DIM = 16
VOCABULARY = 160
POSITIONS = 128
PATCHES = 4  # of a vision tower, along one side of an image
FIRST_FREE_ID = 4  # token ids below it keep their value
LAST_PLAIN_ID = 79  # batches draw from FIRST_FREE_ID..LAST_PLAIN_ID; ids with a meaning come down from VOCABULARY

# What becomes of an integer field, by its name: the first pattern that matches the whole name decides. None keeps it.
Rule = int | Callable[[int], int] | None


def _at_most(limit: int) -> Callable[[int], int]:
    return lambda value: min(value, limit)


def _rules(*pairs: tuple[str, Rule]) -> tuple[tuple[re.Pattern[str], Rule], ...]:
    return tuple((re.compile(pattern), rule) for pattern, rule in pairs)


SIZES = _rules(
    (r"base_channels", _at_most(32)),  # of a convolutional tower, whose norms have 32 groups
    # What a broader pattern below would take for something else.
    (
        r".*(chunk_size_feed_forward|multiple_of|_by$|_channels|kernel|conv_L|feature_layer|_cycles|sampling_rate).*",
        None,
    ),
    (r".*(num_labels|type_vocab_size|merge_size|patch_size|stride|_types|factor|predict_layers|mtp|keep).*", None),
    (r".*(seed|_idx|_iters|hc_mult|hc_count|_ratio|scale_emb)", None),
    # Tokens and positions.
    (r"codebook_size|.*vocab_size_base", 64),
    (r".*(vocab_size|group_vocab|num_embeddings)(_.*)?", VOCABULARY),
    (
        r"(max_position_embeddings|n_positions|max_seq_len|n_ctx|context_length|model_max_length|max_\w+_positions)",
        POSITIONS,
    ),
    (r"mm_tokens_per_image|axial_pos_shape|indexer_budget", 4),
    (r"axial_pos_embds_dim", lambda value: value // 4),
    (r"original_max_position_embeddings", POSITIONS // 2),
    (r"((max_)?(image|img)_size|resolution|crop_size)", _at_most(32)),
    (r".*(sliding_window(_size)?|attention_(chunk|window)_size|local_attention|window_len)", _at_most(8)),
    (r"index_topk(_blocks)?", _at_most(4)),
    (r"canvas_length", _at_most(8)),
    (r"index_kpool|indexer_compress_ratio", _at_most(2)),
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
    (r"hidden_size_per_layer_input", HEAD_DIM),
    (r"adapter_(in|out)(put)?_(dim|size)|patch_embed_hidden_size", WIDTH),
    (r".*(intermediate|ffn|mlp)_?(hidden_|multiple_)?(size|dim)(_mlp)?|d_inner|dim_ff|dff|d_ff|n_inner", 96),
    (r"feed_forward_size", 96),
    (r".*(hidden_size(_global)?|d_model|embed_dim|embedding_(size|dim)|hidden_dim|proj_dim|projection_dim)", WIDTH),
    (r"n_embd|dim|emb_dim|width|output_dim|projector_(in|out)put_dim|lru_width", WIDTH),
)

HEADS = re.compile(r".*(attention_heads|num_heads|n_heads?|attention_heads_per_layer|mamba_heads)")
KV_HEADS = re.compile(r".*(key_value_heads?|kv_heads|kv_n_heads|key_heads)")
TOKEN_ID = re.compile(r".*(token_ids?|token_index(es)?|(im|patch)_\w*id|image_patch_id)")
DROPOUT = re.compile(r".*(dropout|drop_path|drop_rate|droprate|pdrop|jitter).*")
LAYERDROP = re.compile(r".*layerdrop")
DROPPED = 0.4  # a share of two layers that a loop of few batches shows

# Where a multimodal model's config leaves the sections of its rotary embedding to the code (Qwen2-VL's proportions).
DEFAULT_SECTIONS = (16, 24, 24)
# What an absent size stands for, where "absent" is the default of a config that then does not describe a whole model.
ABSENT = {"head_dim": HEAD_DIM, "num_experts_per_tok": 2}


def shrink(config: Mapping[str, Any], tp: int = 2) -> dict[str, Any]:
    """The tiny config with the architecture of ``config`` (a config's ``to_dict()``, nested ones included).

    Args:
        config: plain data, not changed.
        tp: ranks the tiny model will be tensor-parallel over: heads that it divides stay divisible by it, heads that
            it does not divide stay as many as they are.
    """
    heads = heads_of(config.get("text_config", config))
    width = WIDTH if heads % tp == 0 else heads * HEAD_DIM
    return _Shrinker(tp, width, "vision_config" in config).mapping(dict(config))


def heads_of(config: Mapping[str, Any]) -> int:
    """Query heads of a config; 0 where it does not say."""
    return next((v for n, v in config.items() if HEADS.fullmatch(n) and type(v) is int), 0)


@dataclass
class _Shrinker:
    tp: int
    width: int
    multimodal: bool
    ids: dict[int, int] = field(default_factory=dict)  # the same old token id is the same new one everywhere

    def mapping(self, config: dict[str, Any]) -> dict[str, Any]:
        layers = LayerChoice.of(config)
        decided = {name: self._values(name, value) for name, value in layers.changes.items()}
        decided |= self._heads(config) | _head_dims(config) | _state_space(config, self.width)
        decided |= {name: value for name, value in ABSENT.items() if name in config and config[name] is None}
        decided |= self._rope(config, decided)
        if type(config.get("patch_size")) is int and type(config.get("image_size")) is int:
            decided["image_size"] = PATCHES * config["patch_size"]
        if isinstance(config.get("image_grid_pinpoints"), list) and isinstance(config.get("vision_config"), dict):
            side = PATCHES * config["vision_config"]["patch_size"]
            decided["image_grid_pinpoints"] = [[side, side]]
        decided |= {"use_cache": False} if "use_cache" in config else {}
        decided |= {name: config[name] for name in ("id2label", "label2id") if name in config}
        if isinstance(overrides := config.get("per_layer_config"), dict):
            decided["per_layer_config"] = self._per_layer(config, overrides, layers.kept)
        return {name: decided[name] if name in decided else self._values(name, config[name]) for name in config}

    def _values(self, name: str, value: Any) -> Any:
        if isinstance(value, dict):
            named = all(isinstance(key, str) for key in value)
            return self.mapping(value) if named else value
        if isinstance(value, (list, tuple)) and name == "vision_feature_layer":
            return [-1 - position % 2 for position in range(len(value))]  # a tower keeps its last two layers
        if isinstance(value, (list, tuple)):
            return [self._values(name, item) for item in value]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return value
        if LAYERDROP.fullmatch(name):
            return DROPPED if value else value
        if DROPOUT.fullmatch(name):
            return type(value)(0)
        if isinstance(value, float):
            return value
        if TOKEN_ID.fullmatch(name):
            return self._token_id(value)
        rule = next((rule for pattern, rule in SIZES if pattern.fullmatch(name)), None)
        if rule is None or value <= 0:
            return value
        return self.width if rule == WIDTH else rule(value) if callable(rule) else rule

    def _token_id(self, value: int) -> int:
        if value < FIRST_FREE_ID:
            return value
        return self.ids.setdefault(value, VOCABULARY - 1 - len(self.ids))

    def _per_layer(self, config: dict[str, Any], overrides: dict[str, Any], kept: tuple[int, ...]) -> dict[str, Any]:
        """The kept layers' overrides, renumbered. What differed from the model's own value still does."""
        result = {}
        for layer, changed in overrides.items():
            if int(layer) in kept:
                tiny, base = self.mapping(dict(changed)), self.mapping({name: config.get(name) for name in changed})
                for name, value in tiny.items():
                    if type(value) is int and value == base[name] and changed[name] != config.get(name):
                        tiny[name] = 2 * value
                result[str(kept.index(int(layer)))] = tiny
        return result

    def _heads(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """New head counts for the fields of one config that count heads."""
        counts = {n: v for n, v in config.items() if HEADS.fullmatch(n) and type(v) is int}
        kv_counts = {n: v for n, v in config.items() if KV_HEADS.fullmatch(n) and type(v) is int}
        result: dict[str, Any] = {}
        for name, old in counts.items():
            kv_name = next((n for n in kv_counts if _prefix(n) == _prefix(name)), None)
            old_kv = old if kv_name is None else kv_counts[kv_name]
            heads, kv_heads = self._head_pair(old, old_kv)
            result[name] = heads * 2 if _is_wide(config, old) else heads
            if kv_name is not None:
                result[kv_name] = kv_heads
        if isinstance(per_layer := config.get("num_attention_heads_per_layer"), (list, tuple)):
            base = config["num_attention_heads"]
            new = {old: result["num_attention_heads"] * (1 if old == base else 2) for old in per_layer}
            result["num_attention_heads_per_layer"] = [new[old] for old in _follow(config, per_layer)]
        return result

    def _rope(self, config: Mapping[str, Any], decided: Mapping[str, Any]) -> dict[str, Any]:
        """Rotary parameters whose sections of a head (time, height, width) fill the tiny head."""
        rope = config.get("rope_parameters")
        if not isinstance(rope, dict) or "rope_type" not in rope:
            return {}
        implied = HEAD_DIM if "head_dim" in config else self.width // max(heads_of(decided), 1)
        head_dim = decided.get("head_dim", implied)
        half = int(head_dim * rope.get("partial_rotary_factor", 1.0)) // 2
        sections = rope.get("mrope_section", DEFAULT_SECTIONS if self.multimodal else None)
        result = self.mapping(rope)
        whole, turned, share = config.get("head_dim"), config.get("qk_rope_head_dim"), rope.get("partial_rotary_factor")
        if whole and turned and share and whole * share == turned:  # the share says again what the parts of a head say
            result["partial_rotary_factor"] = self._values("qk_rope_head_dim", turned) / head_dim
        return {"rope_parameters": result | ({"mrope_section": _resize(sections, half)} if sections else {})}

    def _head_pair(self, heads: int, kv_heads: int) -> tuple[int, int]:
        """A small pair of the same nature: equal, grouped or multi-query; divisible by tp where the old one is."""
        if heads % self.tp:
            return heads, kv_heads
        many = max(4, self.tp)
        if heads == kv_heads:
            return many, many
        few = gcd(kv_heads, max(2, self.tp))
        return max(many, 2 * few), few


def _resize(sections: Sequence[int], total: int) -> list[int]:
    """``sections`` in about the same proportions, summing to ``total``: what is left over goes where most was cut."""
    exact = [total * section / sum(sections) for section in sections]
    small = [int(section) for section in exact]
    for index in sorted(range(len(small)), key=lambda i: small[i] - exact[i])[: total - sum(small)]:
        small[index] += 1
    return small


def _prefix(name: str) -> str:
    """``swa_`` of ``swa_num_attention_heads``; nothing of ``num_heads`` and ``n_head``."""
    return re.split(r"num_|n_heads?$|kv_n_heads$", name)[0]


def _follow(config: Mapping[str, Any], per_layer: Sequence[Any]) -> list[Any]:
    return [per_layer[layer] for layer in LayerChoice.of(config).kept]


def _is_wide(config: Mapping[str, Any], heads: int) -> bool:
    """Whether the heads together are wider than the residual stream (a ``head_dim`` of its own, as in Qwen3)."""
    head_dim, width = config.get("head_dim"), config.get("hidden_size")
    if "qk_rope_head_dim" in config or not isinstance(head_dim, int) or not isinstance(width, int):
        return False
    return heads * head_dim > width


def _head_dims(config: Mapping[str, Any]) -> dict[str, Any]:
    """Where a head is made of a rotary and a plain part, ``head_dim`` is another name for one of them."""
    parts = {"qk_rope_head_dim": 8, "qk_head_dim": HEAD_DIM + 8, "v_head_dim": HEAD_DIM}
    if "attention_head_dim" in config and "attention_hidden_size" in config:  # heads over [embeddings, hidden states]
        return {"attention_head_dim": 2 * HEAD_DIM, "attention_hidden_size": 2 * WIDTH}
    if "qk_rope_head_dim" not in config or type(config.get("head_dim")) is not int:
        return {}
    same = [new for name, new in parts.items() if config.get(name) == config["head_dim"]]
    for overrides in (config.get("per_layer_config") or {}).values():  # a plain part of its own comes out doubled
        if overrides.get("qk_nope_head_dim", 0) + config["qk_rope_head_dim"] == config["head_dim"]:
            same.append(2 * HEAD_DIM + 8)
    return {"head_dim": same[0]} if same else {}


def _state_space(config: Mapping[str, Any], width: int) -> dict[str, Any]:
    """Mamba's heads times their size is the expanded width; linear attention keeps its ratio of value to key heads."""
    result: dict[str, Any] = {}
    expanded = width * next((config[n] for n in ("mamba_expand", "expand") if type(config.get(n)) is int), 2)
    for name in ("mamba_n_heads", "mamba_num_heads", *(["n_mamba_heads"] if "mamba_headdim" in config else [])):
        if type(config.get(name)) is int:
            result[name] = expanded // HEAD_DIM
    if "state_size" in config and "num_heads" in config and "head_dim" in config:
        result["num_heads"] = expanded // HEAD_DIM
    for name in ("mamba_d_head", "mamba_head_dim"):
        if type(config.get(name)) is int:
            result[name] = HEAD_DIM
    if type(config.get("mamba_d_ssm")) is int:
        result["mamba_d_ssm"] = expanded
    for name in ("n_groups", "mamba_n_groups", "mamba_ngroups"):
        if type(config.get(name)) is int:
            result[name] = min(config[name], 2)
    keys, values = config.get("linear_num_key_heads"), config.get("linear_num_value_heads")
    if type(keys) is int and type(values) is int:
        result |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2 * max(1, min(2, values // keys))}
    return result
