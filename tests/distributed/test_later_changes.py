"""What is put on a model after it was sharded is refused by name, on every rank, before anything is sent."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loops import evaluate, loss, train
from peft import IA3Config, LoraConfig, get_peft_model
from steps import assert_same_parameters
from tiny_models import build
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode

from shardwright import ParallelConfig, parallelize
from shardwright.errors import PlanError
from shardwright.verify.ranks import RankPool, shared_mesh

OF_TWO = (ParallelConfig(tp=2), ParallelConfig(tp=2, sequence_parallel=True), ParallelConfig(dp_shard=2))
OF_FOUR = (ParallelConfig(tp=2, dp_shard=2, sequence_parallel=True), ParallelConfig(dp_replicate=2, dp_shard=2))


def _lora(*targets: str) -> Callable[[Any], nn.Module]:
    return lambda model: get_peft_model(model, LoraConfig(r=2, target_modules=list(targets)))


def _ia3(model: Any) -> nn.Module:
    return get_peft_model(model, IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]))


def _new_head(model: Any) -> nn.Module:
    model.lm_head = nn.Linear(32, 99, bias=False)
    return model


def _another_module(model: Any) -> nn.Module:
    block = model.model.layers[1]
    block.mlp = nn.Sequential(block.mlp, nn.LayerNorm(32))
    return model


def _another_parameter(model: Any) -> nn.Module:
    model.model.norm.weight = nn.Parameter(torch.ones(32))
    return model


ADAPTER = "An adapter would be put on a LlamaForCausalLM"
CHANGES: dict[str, tuple[Callable[[Any], nn.Module], str]] = {
    "columns": (_lora("q_proj", "v_proj"), ADAPTER),
    "rows": (_lora("o_proj"), ADAPTER),
    "embedding": (_lora("embed_tokens"), ADAPTER),
    "head": (_lora("lm_head"), ADAPTER),
    "scales": (_ia3, ADAPTER),
    "new head": (_new_head, r"lm_head\.weight \(99, 32\)"),
    "another module": (_another_module, r"layers\.1\.mlp\.1\.weight"),
    "another parameter": (_another_parameter, r"model\.norm\.weight \(32,\)"),
}


def _parallel(config: ParallelConfig) -> Any:
    return parallelize(build("llama"), config, shared_mesh(config))


def _refused(configs: tuple[ParallelConfig, ...]) -> None:
    for turn, (change, name) in enumerate(CHANGES.values()):
        model = _parallel(configs[turn % len(configs)])
        if turn % 2:
            evaluate(model)  # not only where the first forward finds it
        with CommDebugMode() as sent, pytest.raises(PlanError, match=name) as refusal:
            loss(change(model))
        assert sent.get_total_counts() == 0
        assert "get_peft_model(model, " in str(refusal.value)


@pytest.mark.parametrize("pool", ["ranks2", "ranks4"])
def test_refused_by_name(pool: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(pool).run(_refused, OF_TWO if pool == "ranks2" else OF_FOUR)


def _resized(configs: tuple[ParallelConfig, ...]) -> None:
    for config in configs:
        model = _parallel(config)
        model.resize_token_embeddings(99)
        assert model.resize_token_embeddings() is model.model.embed_tokens
        with pytest.raises(PlanError, match="embedding of 99 tokens is sharded already and cannot be resized to 104"):
            model.resize_token_embeddings(104)
        reference = build("llama")
        assert train(model) == pytest.approx(train(reference), abs=1e-6)
        assert_same_parameters(model, reference)


def test_resizing(ranks2: RankPool) -> None:
    ranks2.run(_resized, OF_TWO)


def _allowed() -> None:
    """What does not add parameters, and taking back what did."""
    for config in OF_TWO:
        model, reference = _parallel(config), build("llama")
        for each in (model, reference):
            train(each, 1)
        head = model.lm_head
        model.lm_head = nn.Linear(32, 99, bias=False)
        with pytest.raises(PlanError):
            loss(model)
        model.lm_head = head
        if config.dp_shard == 2:
            state = {name: value.clone() for name, value in model.state_dict().items()}
            model.load_state_dict(state, assign=True)
        else:
            model.zero_grad()  # torch cannot copy the gradients of DTensors
            model = copy.deepcopy(model)
        model.register_buffer("counter", torch.zeros(1))
        model.extra = nn.Dropout()
        assert train(model) == pytest.approx(train(reference), abs=1e-6)
        assert_same_parameters(model, reference)


def test_what_is_allowed(ranks2: RankPool) -> None:
    ranks2.run(_allowed)


def _replaced_under_fsdp2() -> None:
    model = _parallel(OF_TWO[2])
    evaluate(model)  # FSDP2 takes what it finds in the first forward
    weight = model.model.norm.weight
    model.model.norm.weight = nn.Parameter(weight.detach().clone())
    with pytest.raises(PlanError, match=r"model\.norm\.weight \(32,\) took the place of a parameter"):
        loss(model)


def test_a_parameter_that_fsdp2_does_not_know(ranks2: RankPool) -> None:
    ranks2.run(_replaced_under_fsdp2)
