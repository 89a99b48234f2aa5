"""The bar: a plan as an expert writes it for one model family, on plain torch, after torchtitan's for Llama.

Sequence parallelism keeps the stream split between the blocks, every input is gathered once, the loss is computed on
the vocabulary shards. https://github.com/pytorch/torchtitan (BSD-3) is the source of the layout, not of the code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn import functional
from transformers import AutoModelForCausalLM

from harness.layouts import Layout, NotOfferedError, Sharded
from harness.peers.handwritten_context import context_parallel

FAMILIES = ("llama", "qwen3")


def build(folder: str, layout: Layout) -> Sharded:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").train()
    if model.config.model_type not in FAMILIES and layout.tp > 1:
        raise NotOfferedError(
            f"no plan was written for {model.config.model_type}: torch has no style for fused experts"
        )
    return shard(model, layout)


def shard(model: Any, layout: Layout) -> Sharded:
    """Apply the plan to a model, in place."""
    if layout.cp > 1 and layout.ranks > layout.cp:
        raise NotOfferedError("context parallelism was written for one axis alone")
    mesh = init_device_mesh("cpu", (layout.dp * layout.cp, layout.tp), mesh_dim_names=("dp", "tp"))
    if layout.tp > 1:
        tensor_parallel(model, mesh["tp"], layout.sequence_parallel)
    if layout.activation_checkpointing:
        for index, block in enumerate(model.model.layers):
            model.model.layers[index] = checkpoint_wrapper(block)
    if mesh["dp"].size() > 1:
        *blocks, last = model.model.layers
        for block in blocks:
            fully_shard(block, mesh=mesh["dp"], reshard_after_forward=True)
        fully_shard(last, mesh=mesh["dp"], reshard_after_forward=False)
        fully_shard(model, mesh=mesh["dp"], reshard_after_forward=False)
    backward = context_parallel(model, mesh["dp"]) if layout.cp > 1 else backward_of(model, layout.tp > 1)
    return Sharded(model, backward)


def tensor_parallel(model: Any, mesh: DeviceMesh, sequence_parallel: bool) -> None:
    stream = Shard(1) if sequence_parallel else Replicate()
    # Readers of one tensor are handed one DTensor: its gradient is then summed once, not once per reader.
    whole: dict[str, Any] = {"use_local_output": False}
    outer: dict[str, ParallelStyle] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=stream),
        "lm_head": ColwiseParallel(input_layouts=stream, output_layouts=Shard(-1), use_local_output=False),
    }
    inner: dict[str, ParallelStyle] = {
        "self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": stream},
            desired_input_kwarg_layouts={"hidden_states": Replicate()},
            **whole,
        ),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(output_layouts=stream),
        "mlp": PrepareModuleInput(input_layouts=stream, desired_input_layouts=Replicate(), **whole),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=stream),
    }
    if sequence_parallel:
        outer["model.norm"] = SequenceParallel(use_local_output=True)
        inner["input_layernorm"] = SequenceParallel(use_local_output=True)
        inner["post_attention_layernorm"] = SequenceParallel(use_local_output=True)
    if model.config.model_type == "qwen3":  # [batch, sequence, local heads, head size]
        inner["self_attn.q_norm"] = SequenceParallel(sequence_dim=2, use_local_output=True)
        inner["self_attn.k_norm"] = SequenceParallel(sequence_dim=2, use_local_output=True)
    parallelize_module(model, mesh, outer)
    for block in model.model.layers:
        parallelize_module(block, mesh, inner)


def backward_of(model: Any, sharded_loss: bool) -> Callable[[Mapping[str, Any]], Any]:
    def backward(batch: Mapping[str, Any]) -> Any:
        # Positions are given: the model would count them from a stream that may be split.
        positions = torch.arange(batch["input_ids"].shape[1]).unsqueeze(0)
        logits = model(input_ids=batch["input_ids"], position_ids=positions, use_cache=False).logits
        targets = functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
        if not sharded_loss:
            loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            loss.backward()
            return loss.detach()
        with loss_parallel():
            loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            loss.backward()
        return loss.detach().full_tensor()

    return backward
