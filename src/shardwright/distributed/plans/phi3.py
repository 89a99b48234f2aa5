"""Phi-3: packed gate|up cut piece by piece, packed q|k|v by heads. transformers' plan gathers both on every rank."""

MODEL_TYPES = ("phi3",)

STYLES = {
    "embed_tokens": "embedding_rowwise",
    "layers.*.self_attn.qkv_proj": "fused_qkv",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_up_proj": "packed_colwise",
    "layers.*.mlp.down_proj": "rowwise",
}

# The attention splits its fused projection by these.
LOCAL_ATTRIBUTES = {"layers.*.self_attn": ("config.num_attention_heads", "num_key_value_heads")}
