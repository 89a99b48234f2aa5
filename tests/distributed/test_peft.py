"""PEFT's adapters: what is trained is sharded beside what is frozen, and both are exact."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from steps import assert_same, assert_same_parameters, assert_same_step
from tiny_models import batch, build
from torch import nn
from torch.distributed.tensor import DTensor

from shardwright import ParallelConfig, parallelize
from shardwright.verify.ranks import RankPool, shared_mesh
from shardwright.verify.tiny import randomize

TP = ParallelConfig(tp=2, dp_shard=2)
LAYOUTS = {
    "tp x fsdp2": TP,
    "tp x fsdp2 + sp": TP.with_(sequence_parallel=True, activation_checkpointing="full"),
    "hsdp": ParallelConfig(dp_replicate=2, dp_shard=2),
}


def adapted(family: str, targets: str | list[str], **options: Any) -> nn.Module:
    """A tiny model with adapters that do something: LoRA's own start leaves half of their gradients at zero."""
    model = get_peft_model(build(family), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **options))
    randomize(model)
    return model.train()


def loss(model: nn.Module) -> torch.Tensor:
    return model(**batch(0)).loss


def step(config: ParallelConfig, family: str, targets: str | list[str], **options: Any) -> None:
    reference = adapted(family, targets, **options)
    model = parallelize(copy.deepcopy(reference), config, shared_mesh(config))
    assert all(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in model.parameters())
    assert_same_step(model, reference, loss, "lora")
    trained = [[p for p in each.parameters() if p.requires_grad] for each in (model, reference)]
    norms = [nn.utils.clip_grad_norm_(parameters, 0.1) for parameters in trained]
    assert_same(*norms, "norm")
    for parameters in trained:
        # A smaller epsilon magnifies the rounding of gradients near zero.
        torch.optim.AdamW(parameters, lr=1e-2, eps=1e-3).step()
    assert_same_parameters(model, reference, "after a step")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("family", "targets"),
    [("llama", ["q_proj", "v_proj"]), ("qwen3", "all-linear"), ("phi3", ["qkv_proj", "down_proj"])],
)
def test_lora(family: str, targets: str | list[str], layout: str, ranks4: RankPool) -> None:
    ranks4.run(step, LAYOUTS[layout], family, targets)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dora_reads_the_weights_that_it_adapts(layout: str, ranks4: RankPool) -> None:
    ranks4.run(partial(step, use_dora=True), LAYOUTS[layout], "llama", ["q_proj", "v_proj", "down_proj"])
