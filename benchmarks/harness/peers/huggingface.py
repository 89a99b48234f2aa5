"""transformers: its own tensor and expert parallelism and FSDP2, at loading."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from harness.layouts import Layout, NotOfferedError, Sharded, plain_backward


def build(folder: str, layout: Layout) -> Sharded:
    if layout.sequence_parallel:
        raise NotOfferedError("transformers 5.23 has no sequence parallelism (a reserved option, not wired up)")
    model = load(folder, layout, dtype="float32").train()
    if layout.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Sharded(model, plain_backward(model))


def load(folder: str, layout: Layout, dtype: str) -> Any:
    config = DistributedConfig(tp_size=layout.tp, fsdp_size=layout.dp, ep_size=layout.ep)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, distributed_config=config)
