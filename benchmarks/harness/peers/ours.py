"""Shardwright."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from harness.layouts import Layout, Sharded, plain_backward
from shardwright import ParallelConfig, load_pretrained, parallelize


def config_of(layout: Layout) -> ParallelConfig:
    checkpointing = "full" if layout.activation_checkpointing else "none"
    return ParallelConfig(
        tp=layout.tp,
        dp_shard=layout.dp,
        cp=layout.cp,
        ep=layout.ep,
        context_method="gather",
        sequence_parallel=layout.sequence_parallel,
        activation_checkpointing=checkpointing,
    )


def build(folder: str, layout: Layout) -> Sharded:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    model = parallelize(model.train(), config_of(layout))
    return Sharded(model, plain_backward(model))


def load(folder: str, layout: Layout, dtype: str) -> Any:
    return load_pretrained(folder, config_of(layout), dtype=getattr(torch, dtype))
