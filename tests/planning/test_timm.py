"""A vision transformer of timm; skipped where that is not installed.

It brings torchvision, which loads beside the torch it was built for only: too much to install for one test.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from shardwright import ParallelConfig, parallelize
from shardwright.distributed.planning.derive import derive_plan
from shardwright.verify.ranks import RankPool
from shardwright.verify.step import full
from shardwright.verify.tiny import randomize

timm = pytest.importorskip("timm")
EXACT = 1e-6  # in float64, where nothing but a mistake is larger


def build() -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 10}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    randomize(model)
    return model.double()


def step(model: nn.Module) -> dict[str, Tensor]:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    logits = model(images)
    nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    gradients = {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": full(logits), **gradients}


def worst_error(config: ParallelConfig) -> float:
    model = build()
    expected = step(copy.deepcopy(model))
    found = step(parallelize(model, config))
    assert found.keys() == expected.keys()
    return max(
        ((found[key] - value).abs().max() / value.abs().max().clamp(min=1e-3)).item() for key, value in expected.items()
    )


def test_the_blocks_run_on_slices() -> None:
    plan = derive_plan(build().float(), torch.zeros(2, 3, 32, 32))
    assert plan.styles == {
        "blocks.*.attn.qkv": "packed_colwise:3",
        "blocks.*.attn.proj": "rowwise",
        "blocks.*.mlp.fc1": "colwise",
        "blocks.*.mlp.fc2": "rowwise",
    }


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_exact(sequence_parallel: bool, ranks4: RankPool) -> None:
    config = ParallelConfig(tp=2, sequence_parallel=sequence_parallel, activation_checkpointing="full")
    assert max(ranks4.run(worst_error, config)) < EXACT
