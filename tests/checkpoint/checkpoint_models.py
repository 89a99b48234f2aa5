"""Tiny models that differ in what a checkpoint has to cope with."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import LlamaConfig, MixtralConfig, Phi3Config, Qwen3Config

from shardwright.distributed.config import ParallelConfig
from shardwright.distributed.mesh import make_mesh
from shardwright.distributed.runtime.layout import whole
from shardwright.verify.ranks import shared_mesh

_COMMON = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

CONFIGS = {
    "llama": LlamaConfig(**_COMMON, rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}),
    "qwen3_tied": Qwen3Config(**_COMMON, head_dim=8, tie_word_embeddings=True),
    "phi3_packed": Phi3Config(**_COMMON),
    # On a GPU in bfloat16, torch's grouped product takes widths, of a rank's slice too, that 8 divides.
    "mixtral_stacked": MixtralConfig(**{**_COMMON, "intermediate_size": 32}, num_local_experts=4),
}
MESHES = {
    "tp2": ParallelConfig(tp=2),
    "fsdp2": ParallelConfig(dp_shard=2),
    "tp2 x fsdp2": ParallelConfig(tp=2, dp_shard=2),
    "hsdp": ParallelConfig(dp_replicate=2, dp_shard=2),
    "ep2": ParallelConfig(dp_shard=2, ep=2),
    "efsdp2 x ep2": ParallelConfig(dp_shard=4, ep=2),
    "fsdp4": ParallelConfig(dp_shard=4),
}


def mesh_for(config: ParallelConfig) -> DeviceMesh:
    return shared_mesh(config) if dist.is_initialized() else make_mesh(config)


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer, gathered."""
    tensors = {**model.state_dict(), **dict(model.named_buffers())}
    return {name: whole(value) for name, value in tensors.items()}


def assert_same_state(model: nn.Module, expected: nn.Module) -> None:
    here, there = whole_state(model), whole_state(expected)
    assert list(here) == list(there)
    for name, value in there.items():
        assert here[name].dtype == value.dtype, name
        torch.testing.assert_close(here[name], value, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
