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
from torch.distributed.tensor.debug import CommDebugMode

from shardwright import ParallelConfig, parallelize
from shardwright.distributed.planning.tensor import plan_and_resolve
from shardwright.distributed.replay.reading import ModelReading
from shardwright.verify.ranks import RankPool, shared_mesh
from shardwright.verify.tiny import randomize

TP = ParallelConfig(tp=2, dp_shard=2)
LAYOUTS = {
    "tp x fsdp2": TP,
    "tp x fsdp2 + sp": TP.with_(sequence_parallel=True, activation_checkpointing="full"),
    "hsdp": ParallelConfig(dp_replicate=2, dp_shard=2),
}


def adapted(family: str, targets: str | list[str], sizes: dict[str, int] | None = None, **options: Any) -> nn.Module:
    """A tiny model with adapters that do something: LoRA's own start leaves half of their gradients at zero."""
    options = {"r": 4, "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(build(family, **(sizes or {})), LoraConfig(target_modules=targets, **options))
    randomize(model)
    return model.train()


def loss(model: nn.Module) -> torch.Tensor:
    return model(**batch(0)).loss


def step(config: ParallelConfig, family: str, targets: str | list[str], *, every: bool = True, **options: Any) -> None:
    """One step against one process; ``every`` parameter is sharded."""
    reference = adapted(family, targets, **options)
    model = parallelize(copy.deepcopy(reference), config, shared_mesh(config))
    cut = [isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in model.parameters()]
    assert all(cut) if every else any(cut)
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


OTHER_ADAPTERS = {
    "a bias that is added once": ("llama", ["o_proj", "gate_proj"], {"lora_bias": True}),
    "one key-value head": ("llama", "all-linear", {}),
    "embedding and head": ("llama", ["embed_tokens", "lm_head", "down_proj"], {}),
    "transposed weights": ("gpt2", ["c_attn", "c_proj", "c_fc"], {"fan_in_fan_out": True}),
    "modules trained as wholes": ("llama", ["q_proj", "o_proj"], {"modules_to_save": ["lm_head", "norm"]}),
    "rank-stabilised": ("qwen3", ["v_proj", "up_proj"], {"use_rslora": True, "r": 8}),
}


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "tp+sp"])
@pytest.mark.parametrize("kind", OTHER_ADAPTERS)
def test_other_adapters(kind: str, sequence_parallel: bool, ranks2: RankPool) -> None:
    family, targets, options = OTHER_ADAPTERS[kind]
    layout = ParallelConfig(tp=2, dp_shard=1, sequence_parallel=sequence_parallel)
    sizes = {"num_key_value_heads": 1} if kind == "one key-value head" else {}
    if family == "gpt2":
        sizes = {"attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0}
    ranks2.run(partial(step, sizes=sizes, every=False, **options), layout, family, targets)


def _collectives(config: ParallelConfig, targets: str | None) -> dict[str, int]:
    model = build("llama") if targets is None else adapted("llama", targets)
    model = parallelize(model, config, shared_mesh(config))
    with CommDebugMode() as counted:
        loss(model).backward()
    return {str(kind): count for kind, count in counted.get_comm_counts().items()}


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "tp+sp"])
def test_adapters_send_what_the_base_model_sends(sequence_parallel: bool, ranks2: RankPool) -> None:
    """But for one sum of small gradients, which sequence parallelism has anyway."""
    config = ParallelConfig(tp=2, dp_shard=1, sequence_parallel=sequence_parallel)
    base, with_adapters = (ranks2.run(_collectives, config, targets)[0] for targets in (None, "all-linear"))
    assert sum(with_adapters.values()) <= sum(base.values()) + (0 if sequence_parallel else 1)
    assert with_adapters.keys() == base.keys()


def test_an_adapted_model_takes_the_plan_of_its_base_model() -> None:
    plain, lora = (
        plan_and_resolve(ModelReading(model), None, 2) for model in (build("llama"), adapted("llama", "all-linear"))
    )
    assert lora[0].source == plain[0].source == "huggingface"
    for name, use in plain[1].modules.items():
        if use.origin == "plan" and ".layers." in name:
            assert lora[1].modules[f"base_model.model.{name}"].style == use.style
            assert lora[1].modules[f"base_model.model.{name}.base_layer"].inside


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dora_reads_the_weights_that_it_adapts(layout: str, ranks4: RankPool) -> None:
    ranks4.run(partial(step, use_dora=True), LAYOUTS[layout], "llama", ["q_proj", "v_proj", "down_proj"])
