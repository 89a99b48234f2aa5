"""Adapters that begin on a model of which each rank reads its part: their first values are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, get_peft_model
from torch import Tensor
from trainer_runs import Rows, build, state_of
from transformers import AutoModelForCausalLM

from shardwright import ParallelConfig, load_adapted
from shardwright.distributed.runtime.layout import whole
from shardwright.errors import ShardwrightError, UnsupportedError
from shardwright.train.lora import check_adapters, lora_config, put_on_whole
from shardwright.train.sections import LoraSettings
from shardwright.verify.ranks import RankPool, shared_mesh

FSDP2, TP = ParallelConfig(dp_shard=2), ParallelConfig(tp=2, sequence_parallel=True)
SEED = 11
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
KINDS: dict[str, tuple[str, dict[str, Any], LoraSettings]] = {
    "dora": ("llama", {}, LoraSettings(r=4, dora=True, rank_stabilised=True, modules_to_save=("lm_head",))),
    "tied": (
        "llama",
        {"tie_word_embeddings": True},
        LoraSettings(r=4, target_modules=("q_proj",), modules_to_save=("embed_tokens", "norm")),
    ),
    "on tied": ("llama", {"tie_word_embeddings": True}, LoraSettings(r=4)),
    "experts": (
        "mixtral",
        EXPERTS,
        LoraSettings(r=4, target_parameters=("mlp.experts.gate_up_proj", "mlp.experts.down_proj")),
    ),
}


def step(model: Any) -> dict[str, Tensor]:
    """The weights before and after a step."""
    before = state_of(model)
    ids = Rows()[0]["input_ids"][None]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    return {
        "loss": whole(loss.detach()),
        **before,
        **{f"then {name}": value for name, value in state_of(model).items()},
    }


def sharded(folder: Path, kind: str, config: ParallelConfig) -> dict[str, Tensor] | str:
    try:
        model = load_adapted(folder, lora_config(KINDS[kind][2]), config, shared_mesh(config), seed=SEED)
    except ShardwrightError as error:
        return str(error)
    return step(model.train())


@pytest.mark.parametrize("kind", KINDS)
def test_first_values_and_a_step_are_those_of_one_process(ranks2: RankPool, tmp_path: Path, kind: str) -> None:
    family, changes, settings = KINDS[kind]
    build(family, **changes).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    check_adapters(settings, base.config)
    plain = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), lora_config(settings))
    whole_model = put_on_whole(base, settings, SEED)
    for name, value in plain.state_dict().items():  # all that PEFT does not draw
        assert "lora_A" in name or torch.equal(whole_model.state_dict()[name], value), name
    wanted = step(whole_model.train())
    for config in (FSDP2, TP):
        found = ranks2.run(sharded, tmp_path, kind, config)[1]
        if kind == "experts" and config == TP:
            assert isinstance(found, str)
            assert "target_parameters" in found
            continue
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            close = torch.allclose(found[name], value, atol=1e-5, rtol=1e-5)
            same = torch.equal(found[name], value) or "magnitude" in name
            assert close if name == "loss" or name.startswith("then ") else close and same, (config, name)


def test_adapters_without_first_values_are_refused_before_there_are_ranks(ranks2: RankPool, tmp_path: Path) -> None:
    model = build()
    with pytest.raises(UnsupportedError, match=r"embed_tokens\.lora_magnitude_vector.* of an adapter that has no"):
        check_adapters(LoraSettings(r=4, dora=True, target_modules=("embed_tokens", "q_proj")), model.config)
    model.save_pretrained(tmp_path)
    found = ranks2.run(ia3, tmp_path)
    assert found[0] == found[1]
    assert "ia3_l" in found[0]


def ia3(folder: Path) -> str:
    with pytest.raises(ShardwrightError) as caught:
        load_adapted(folder, IA3Config(task_type="CAUSAL_LM"), FSDP2, shared_mesh(FSDP2))
    return str(caught.value)
