"""The config of the model a user names, completed where transformers' defaults describe none that runs."""

from __future__ import annotations

import os
from typing import Any

from transformers import PreTrainedConfig

from shardwright.distributed.models import build

# What the default config of a type lacks to describe a model that runs (at any size).
_FULL_ROPE = {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
_QWEN4_INDEXER = {
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 128,
    "indexer_budget": 2048,
    "indexer_compress_ratio": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
}
COMPLETED: dict[str, dict[str, Any]] = {
    "blip-2": {"image_token_index": 50265},
    "chameleon": {"vocabulary_map": {"<image>": 4, "IMGIMGBS": 5, "IMGIMGCS": 6}},
    "cohere_compass": {"text_config": {"rope_parameters": _FULL_ROPE}},
    "cohere_compass_text": {"rope_parameters": _FULL_ROPE},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense"] + ["sparse"] * 11, "num_hidden_layers": 12}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma": {"text_config": {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "emu3": {"vocabulary_map": {"<image>": 4, "<|extra_200|>": 5, "<|visual token 000000|>": 6}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                                             "mrope_section": [22, 22, 20]}}},
    "flint": {"mlp_only_layers": [0]},
    "granite4_vision": {"deepstack_layer_map": [[-2, 0]], "downsample_rate": "1/2"},
    "instructblip": {"image_token_index": 50265},
    "instructblipvideo": {"video_token_index": 50265},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": {"text_config": _QWEN4_INDEXER},
    "qwen4_exp_text": _QWEN4_INDEXER,
    "reformer": {"is_decoder": True},
    "step3p7": {"text_config": {"sliding_window": 512}},
    "udop": {"decoder_start_token_id": 0},
    "xmod": {"default_language": "en_XX"},
}  # fmt: skip


def load_config(model: str | os.PathLike[str] | PreTrainedConfig) -> PreTrainedConfig:
    """The config of a checkpoint folder, a ``config.json`` or a model type; nothing is downloaded.

    Raises:
        ConfigError: ``model`` is none of these, or its config does not load.
    """
    return build.load_config(model, COMPLETED)
