"""LoRA of several families: trained sharded by transformers' Trainer, saved, and read by plain PEFT on one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from trainer_runs import Rows, arguments, assert_same, build, on_ranks, result
from transformers import Trainer

from shardwright import ParallelConfig
from shardwright.distributed.runtime.layout import whole
from shardwright.errors import PlanError
from shardwright.verify.ranks import RankPool

Shard = Callable[[nn.Module], nn.Module]
WAYS = {"fsdp2": ParallelConfig(dp_shard=2), "tp + sp": ParallelConfig(tp=2, sequence_parallel=True)}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Name -> type, what its config has besides, and what is adapted.
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {"target_modules": [*ATTENTION, *MLP]}),
    "qwen3": ("qwen3", {}, {"target_modules": [*ATTENTION, *MLP]}),
    "gemma3": ("gemma3_text", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}, {
        "target_modules": [*ATTENTION, *MLP],
    }),
    "mixtral": ("mixtral", EXPERTS, {"target_modules": ATTENTION}),
    "mixtral's experts": ("mixtral", EXPERTS, {
        "target_modules": ATTENTION, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }),
}  # fmt: skip


def ids() -> torch.Tensor:
    return Rows()[0]["input_ids"][None]


def adapted(family: str) -> Any:
    kind, changes, adapters = FAMILIES[family]
    model = build(kind, **changes)
    torch.manual_seed(5)
    return get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **adapters))


def _train(shard: Shard, ranks: int, folder: Path) -> dict[str, Any]:
    found = {}
    for family in FAMILIES:
        if family == "mixtral's experts" and ranks == 1 and dist.is_initialized():
            with pytest.raises(PlanError, match=r"on its parameter down_proj \(PEFT's target_parameters\)"):
                shard(adapted(family))
            continue
        trainer = Trainer(
            model=shard(adapted(family)), args=arguments(folder / family, ranks, max_steps=2), train_dataset=Rows()
        )
        trainer.train()
        trainer.model.save_pretrained(folder / family)
        with torch.no_grad():
            found[family] = {**result(trainer), "logits": whole(trainer.model(ids()).logits)}
    return found


def test_trained_saved_and_read_by_plain_peft(ranks2: RankPool, tmp_path: Path) -> None:
    wanted = _train(lambda model: model, 1, tmp_path / "one")
    for way, config in WAYS.items():
        found = ranks2.run(on_ranks, _train, config, tmp_path / way)[0]
        for family, ours in found.items():
            print(way, family)  # shown where it fails
            assert_same(ours, wanted[family])
            kind, changes, _ = FAMILIES[family]
            again = PeftModel.from_pretrained(build(kind, **changes), tmp_path / way / family)
            with torch.no_grad():
                logits = again(ids()).logits
            assert torch.allclose(logits, ours["logits"], atol=1e-5)
            assert torch.allclose(logits, wanted[family]["logits"], atol=1e-4)
