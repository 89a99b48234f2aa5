"""Gemma 3n: its MLP takes mean and deviation over all features, so the MLP's output is gathered.

transformers' plan cuts the features and is not exact.
"""

MODEL_TYPES = ("gemma3n_text",)

STYLES = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
    "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
    "layers.*.self_attn.v_norm": "replicated_with_grad_allreduce",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise_gather_output",
    "layers.*.mlp.up_proj": "colwise_gather_output",
    "layers.*.mlp.down_proj": "rowwise_split_input",
}

LOCAL_ATTRIBUTES: dict[str, tuple[str, ...]] = {}
