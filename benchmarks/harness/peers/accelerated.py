"""accelerate: FSDP2 around the model that transformers loads."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from harness.layouts import Layout, NotOfferedError, Sharded, plain_backward


def build(folder: str, layout: Layout) -> Sharded:
    model = load(folder, layout, dtype="float32").train()
    return Sharded(model, plain_backward(model))


def load(folder: str, layout: Layout, dtype: str) -> Any:
    """Rank 0 reads the checkpoint and hands the shards out: accelerate's memory-saving way."""
    if layout.tp > 1 or layout.sequence_parallel:
        raise NotOfferedError("used here for FSDP2 alone: its tensor parallelism is that of transformers")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=True,
        activation_checkpointing=layout.activation_checkpointing,
    )
    accelerator = Accelerator(cpu=True)
    # On CPU ranks accelerate passes over its FSDP plugin without a word and replicates the model. What it would call on
    # a GPU runs on gloo too, once its state says so.
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    model = fsdp2_prepare_model(accelerator, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))
    if not all(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise NotOfferedError("accelerate did not shard the model on CPU ranks")
    return model
