"""LoRA on stacked experts (PEFT's ``target_parameters``) on ranks of their own: the same function as one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from steps import assert_same, assert_same_gradients, assert_same_parameters
from test_expert_parallel import EP2, mixtral, text
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM

from shardwright import ParallelConfig, parallelize
from shardwright.errors import PlanError
from shardwright.verify.ranks import RankPool, shared_mesh
from shardwright.verify.step import full

peft = pytest.importorskip("peft")
UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


def gpt_oss() -> nn.Module:
    """Its weights are transposed, and have biases."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return GptOssForCausalLM(GptOssConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=2))


def adapted(base: Callable[[], nn.Module], *parameters: str, **options: Any) -> Any:
    model = base()
    torch.manual_seed(7)
    config = peft.LoraConfig(
        r=3, target_modules=["q_proj"], target_parameters=list(parameters), init_lora_weights=False, **options
    )
    return peft.get_peft_model(model, config)


def favoured() -> nn.Module:
    return mixtral("grouped_mm", 2)


def three_experts() -> nn.Module:
    torch.manual_seed(0)
    model = mixtral()
    return type(model)(type(model.config)(**{**model.config.to_dict(), "num_local_experts": 3}))  # type: ignore[operator, arg-type]


def _steps(make: Callable[[], Any], config: ParallelConfig) -> None:
    """Two micro-batches, a clipped step, an evaluation with and without the adapters, and one with them merged."""
    model, reference = parallelize(make(), config, shared_mesh(config)), make()
    what = f"{type(reference.base_model.model).__name__}, {config}"
    for micro in range(2):
        for rank in range(2):
            (reference(**text(2 * rank + micro)).loss / 2).backward()
        model(**text(2 * dist.get_rank() + micro)).loss.backward()
    assert_same_gradients(model, reference, what)
    for each in (model, reference):
        nn.utils.clip_grad_norm_(each.parameters(), 0.5)
        torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-2, eps=1e-2).step()
        each.eval()
    assert_same_parameters(model, reference, what)
    with torch.no_grad():
        assert_same(full(model(**text(9)).logits), reference(**text(9)).logits, what)
        with model.disable_adapter(), reference.disable_adapter():
            assert_same(full(model(**text(9)).logits), reference(**text(9)).logits, f"{what}, without adapters")
        for each in (model, reference):
            each.merge_adapter()
        assert_same(full(model(**text(9)).logits), reference(**text(9)).logits, f"{what}, merged")
        for each in (model, reference):
            each.unmerge_adapter()
        assert_same(full(model(**text(9)).logits), reference(**text(9)).logits, f"{what}, unmerged")


def _every_layout(folder: Path) -> None:
    _steps(lambda: adapted(mixtral, UP, DOWN), EP2)
    _steps(lambda: adapted(gpt_oss, DOWN), EP2.with_(activation_checkpointing="full"))
    _steps(lambda: adapted(favoured, UP, use_rslora=True), EP2)
    _steps(lambda: adapted(three_experts, UP, DOWN), EP2.with_(activation_checkpointing="selective"))
    model = parallelize(adapted(mixtral, UP, DOWN), EP2, shared_mesh(EP2))
    with pytest.raises(PlanError, match="merge_adapter"):
        model.merge_and_unload()
    model.save_pretrained(folder)


def test_as_in_one_process(ranks2: RankPool, tmp_path: Path) -> None:
    ranks2.run(_every_layout, tmp_path)
    again, expected = peft.PeftModel.from_pretrained(mixtral(), tmp_path), adapted(mixtral, UP, DOWN)
    with torch.no_grad():
        assert torch.equal(again(**text(0)).logits, expected(**text(0)).logits)
