"""Experts on ranks of their own: the same function as one process, whatever the router does."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from expert_faults import (
    FAULTS,
    OVER_TP,
    BalancedRouter,
    bias_on_every_rank,
    counted_twice,
    no_gradient_where_nothing_came,
)
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from shardwright import ParallelConfig, load_pretrained, parallelize, save_pretrained
from shardwright.distributed.planning.experts import decide_experts
from shardwright.distributed.replay.reading import ModelReading
from shardwright.distributed.runtime import collectives as c
from shardwright.errors import ConfigError, PlanError, UnsupportedError
from shardwright.estimate.experts import EXCHANGES, bytes_per_token, expert_notes
from shardwright.verify import verify
from shardwright.verify.public import case_of
from shardwright.verify.ranks import RankError, RankPool, shared_mesh

EP2 = ParallelConfig(dp_shard=2, ep=2)
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 64,
}


def _sweep(case: Any) -> Any:
    """A case of what another one covers."""
    return pytest.param(case, marks=pytest.mark.sweep)


def mixtral(implementation: str = "grouped_mm", favourite: int | None = None) -> nn.Module:
    """Four experts, two per token.

    Args:
        favourite: an expert that every token goes to, with the one behind it; None leaves it to the router.
    """
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, num_local_experts=4, experts_implementation=implementation)
    model = MixtralForCausalLM(config)
    if favourite is not None:
        for layer in model.model.layers:
            weight = layer.mlp.gate.weight
            weight.data.mul_(0.01)
            layer.input_layernorm.weight.data[0] = 3.0
            model.model.embed_tokens.weight.data[:, 0] = 10.0
            weight.data[favourite, 0] = 2.0
            weight.data[favourite + 1, 0] = 1.0
    return model


def text(number: int) -> Mapping[str, torch.Tensor]:
    ids = torch.randint(64, (2, 11), generator=torch.Generator().manual_seed(number))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", _sweep("grouped_mm")])
def test_every_implementation_of_experts(ranks2: RankPool, implementation: str) -> None:
    report = verify(partial(mixtral, implementation), EP2, batch=text, accumulate=2, pool=ranks2)
    assert report.exact, report.summary()


@pytest.mark.parametrize("favourite", [0, _sweep(2)])
def test_a_rank_that_no_token_comes_to(ranks2: RankPool, favourite: int) -> None:
    report = verify(partial(mixtral, "grouped_mm", favourite), EP2, batch=text, pool=ranks2)
    assert report.exact, report.summary()


@pytest.mark.parametrize(
    "config",
    [
        ParallelConfig(dp_shard=4, ep=2, activation_checkpointing="full"),
        ParallelConfig(dp_shard=2, tp=2, ep=4, sequence_parallel=True),
        ParallelConfig(dp_replicate=2, tp=2, dp_shard=1, ep=2),
        _sweep(ParallelConfig(dp_shard=1, tp=4, ep=2)),
    ],
    ids=["efsdp", "ep_over_tp_and_dp", "replicas", "efsdp_over_tp"],
)
def test_beside_the_other_axes(ranks4: RankPool, config: ParallelConfig) -> None:
    report = verify(partial(mixtral, "grouped_mm", 2), config, batch=text, pool=ranks4)
    assert report.exact, report.summary()


@pytest.mark.parametrize(
    "config",
    [
        ParallelConfig(dp_shard=2, cp=2, ep=2, activation_checkpointing="full"),
        ParallelConfig(dp_shard=1, cp=2, tp=2, ep=4, sequence_parallel=True),
    ],
    ids=["efsdp_over_cp", "ep_over_cp_and_tp"],
)
def test_parts_of_sequences(ranks4: RankPool, config: ParallelConfig) -> None:
    """Context-parallel ranks have other tokens each, and tensor-parallel ones the same."""
    report = verify(mixtral, config, batch=text, accumulate=2, pool=ranks4)
    assert report.exact, report.summary()


@pytest.mark.parametrize(
    "model_type",
    [
        "gpt_oss",  # weights interleaved and transposed, with biases
        "deepseek_v3",  # a router in groups, shared experts
        "nemotron_h",  # no gate
        _sweep("jamba"),  # beside state-space layers
        _sweep("granitemoe"),
        _sweep("olmoe"),
        "flex_olmo",  # seven experts
        "llama4_text",  # every expert gets every token
        "jetmoe",  # two calls with sorted rows
    ],
)
def test_layouts_of_packed_weights(ranks2: RankPool, model_type: str) -> None:
    report = verify(model_type, EP2, pool=ranks2)
    assert report.exact, report.summary()


@pytest.mark.parametrize("model_type", [_sweep("qwen3_moe"), "llama4_text", "jetmoe", "dbrx"])
def test_ranks_that_share_tokens_send_a_part_each(ranks2: RankPool, model_type: str) -> None:
    report = verify(model_type, ParallelConfig(dp_shard=1, tp=2, ep=2, sequence_parallel=True), pool=ranks2)
    assert report.exact, report.summary()


def balanced() -> nn.Module:
    """A router with counters, which are buffers: what is chosen depends on what was."""
    model = mixtral()
    for layer in model.model.layers:
        layer.mlp.gate.__class__ = BalancedRouter
        layer.mlp.gate.register_buffer("load", torch.zeros(4))
    return model


# What a mistake needs to show; a Mixtral without more where nothing is said.
MODELS: dict[Any, Any] = {
    bias_on_every_rank: "gpt_oss",
    counted_twice: balanced,
    no_gradient_where_nothing_came: partial(mixtral, "grouped_mm", 2),
}


@pytest.mark.parametrize("fault", list(FAULTS), ids=lambda fault: fault.__name__)
def test_verify_finds_what_others_got_wrong(ranks2: RankPool, fault: Any) -> None:
    model = MODELS.get(fault, mixtral)
    check = partial(verify, model, FAULTS[fault], batch=None if isinstance(model, str) else text, accumulate=2)
    if fault is no_gradient_where_nothing_came:  # one rank waits for a gradient that the other does not have
        with pytest.raises(RankError):
            check(pool=ranks2, parallelize=fault)
        return
    assert not check(pool=ranks2, parallelize=fault).exact


@pytest.mark.parametrize("model", [mixtral, _sweep("gpt_oss"), balanced])
def test_these_models_without_a_mistake(ranks2: RankPool, model: Any) -> None:
    config = OVER_TP.with_(activation_checkpointing="full")
    report = verify(model, config, batch=None if isinstance(model, str) else text, accumulate=2, pool=ranks2)
    assert report.exact, report.summary()


def _exchanges() -> tuple[int, int]:
    model = parallelize(mixtral(), EP2, shared_mesh(EP2))
    counts = []
    with CommDebugMode() as mode:
        loss = model(**text(dist.get_rank())).loss
        counts.append(mode.get_comm_counts()[torch.ops.c10d_functional.all_to_all_single])
        loss.backward()
        counts.append(mode.get_comm_counts()[torch.ops.c10d_functional.all_to_all_single])
    return counts[0], counts[1] - counts[0]


def test_exchanges_of_a_layer(ranks2: RankPool) -> None:
    """Forward: counts, tokens, results. Backward: the gradients of results and of tokens."""
    layers = SIZES["num_hidden_layers"]
    assert ranks2.run(_exchanges) == [(3 * layers, 2 * layers)] * 2


def _tokens_sent(favourite: int) -> int:
    """Bytes of tokens that this rank sends to the other in a forward and backward."""
    model = parallelize(mixtral("grouped_mm", favourite), EP2, shared_mesh(EP2))
    sent, all_to_all = 0, c.all_to_all

    def counted(x: torch.Tensor, send: list[int], receive: list[int], group: c.Group) -> torch.Tensor:
        nonlocal sent
        others = sum(rows for rank, rows in enumerate(send) if rank != group.rank)
        sent += others * x.shape[-1] * x.element_size() if x.is_floating_point() else 0
        return all_to_all(x, send, receive, group)

    with patch.object(c, "all_to_all", counted):
        model(**text(dist.get_rank())).loss.backward()
    return sent


def test_what_is_sent_is_what_the_plan_says(ranks2: RankPool) -> None:
    """Every token goes to the second rank's experts, so that half of all tokens travel: as many as in balance."""
    reading = ModelReading(mixtral())
    plan = decide_experts(reading, 2)
    assert plan is not None
    tokens = text(0)["input_ids"].numel()
    said = sum(EXCHANGES * bytes_per_token(reading, plan, name, 4) * tokens for name in plan.modules)
    assert sum(ranks2.run(_tokens_sent, 2)) / 2 == said
    notes = expert_notes(reading, plan, 4)
    assert "4 experts lie on 2 ranks, 2 on each: rank 0 of ep holds 0 to 1, the last 2 to 3" in notes[0]


def _layout_and_files(folder: Path) -> dict[str, tuple[int, ...]]:
    model = load_pretrained(folder, EP2, shared_mesh(EP2))
    whole = AutoModelForCausalLM.from_pretrained(folder)
    for (name, param), (_, expected) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        assert isinstance(param, DTensor)
        assert torch.equal(param.full_tensor(), expected), name
    save_pretrained(model, folder / "again")
    return {name: tuple(param.to_local().shape) for name, param in model.named_parameters()}


def test_loads_into_shards_and_saves_the_plain_layout(ranks2: RankPool, tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path)
    shapes = ranks2.run(_layout_and_files, tmp_path)[0]
    assert shapes["model.layers.0.mlp.experts.gate_up_proj"] == (2, 96, 32)  # two of four experts, whole
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (tmp_path, tmp_path / "again")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)


def _updates_in_one_call() -> None:
    """Optimizers on GPUs update all parameters in one call, which mixes both meshes."""
    results = []
    for foreach in (True, False):
        model = parallelize(mixtral(), EP2, shared_mesh(EP2))
        model(**text(dist.get_rank())).loss.backward()
        params = list(model.parameters())
        norm = torch.nn.utils.clip_grad_norm_(params, 0.1, foreach=foreach)
        torch.optim.AdamW(params, lr=0.1, foreach=foreach).step()
        results.append([norm.full_tensor(), *(param.full_tensor().detach() for param in params)])
    for one_call, one_by_one in zip(*results, strict=True):
        torch.testing.assert_close(one_call, one_by_one)


@pytest.mark.sweep
def test_updates_in_one_call(ranks2: RankPool) -> None:
    ranks2.run(_updates_in_one_call)


def _three_steps(config: ParallelConfig) -> list[tuple[float, float]]:
    model = parallelize(mixtral(), config, shared_mesh(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for step in range(3):
        loss = model(**text(dist.get_rank() + 2 * step)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss.item(), norm.full_tensor().item()))
    return found


def test_in_bf16_as_with_fsdp2_alone(ranks2: RankPool) -> None:
    config = EP2.with_(precision="bf16")
    alone = ranks2.run(_three_steps, config.with_(ep=1))
    for spread, expected in zip(ranks2.run(_three_steps, config), alone, strict=True):
        for (loss, norm), (expected_loss, expected_norm) in zip(spread, expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-3)
            assert norm == pytest.approx(expected_norm, rel=1e-2)


def _with_adapters_on_biases() -> nn.Module:
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj_bias"])
    return peft.get_peft_model(case_of("gpt_oss", EP2).build(), adapters)


def _llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def _refused(build: Any, config: ParallelConfig) -> str:
    try:
        parallelize(build(), config, shared_mesh(config))
    except (PlanError, UnsupportedError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("build", "config", "words"),
    [
        (_llama, EP2, "LlamaForCausalLM has no experts"),
        (_with_adapters_on_biases, EP2, "has adapters on its experts"),
    ],
)
def test_refused_by_name(ranks2: RankPool, build: Any, config: ParallelConfig, words: str) -> None:
    answers = ranks2.run(_refused, build, config)
    assert words in answers[0]
    assert len(set(answers)) == 1


def test_ranks_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"ep is 3.*dp_shard \(4\)"):
        ParallelConfig(ep=3).degrees(4)
    with pytest.raises(ConfigError, match=r"ep \(2\) is for the engine fsdp2"):
        ParallelConfig(ep=2, engine="megatron_fsdp")
