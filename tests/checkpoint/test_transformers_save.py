"""``model.save_pretrained`` of a sharded model: written by all ranks, or whole weights handed over."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_models import CONFIGS, mesh_for
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoModelForCausalLM, PreTrainedModel

from shardwright import ParallelConfig, parallelize
from shardwright.errors import UnsupportedError
from shardwright.verify.ranks import RankPool

TP = ParallelConfig(tp=2)
WAYS = {"tp2": TP, "tp2 + sp": TP.with_(sequence_parallel=True), "fsdp2": ParallelConfig(dp_shard=2)}


def _build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(deepcopy(CONFIGS[name]))


def _saved(name: str, config: ParallelConfig, folder: Path) -> str:
    model: Any = _build(name)
    model = parallelize(model, config, mesh_for(config))
    model.save_pretrained(folder)  # on every rank, as trainers do
    with pytest.raises(UnsupportedError) as caught:
        model.save_pretrained(folder, state_dict=model.state_dict())
    with pytest.raises(UnsupportedError, match="push_to_hub"):
        model.save_pretrained(folder, push_to_hub=True)
    return str(caught.value)


@pytest.mark.parametrize("config", list(WAYS.values()), ids=list(WAYS))
def test_written_by_all_ranks(ranks2: RankPool, config: ParallelConfig, tmp_path: Path) -> None:
    found = ranks2.run(_saved, "llama", config, tmp_path / "out")
    assert found[0] == found[1]
    assert "model.save_pretrained(folder)" in found[0]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for key, value in _build("llama").state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def _gathered(name: str, config: ParallelConfig, adapters: bool, folder: Path) -> None:
    model: Any = _build(name)
    if adapters:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    whole = {key: value.clone() for key, value in model.state_dict().items()}
    model = parallelize(model, config, mesh_for(config))
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state)
        again: Any = AutoModelForCausalLM.from_pretrained(folder) if not adapters else _build(name)
        if adapters:
            again = PeftModel.from_pretrained(again, folder)
        for key, value in again.state_dict().items():
            assert torch.equal(value, whole[key]), key
    dist.barrier()


@pytest.mark.parametrize(
    ("name", "adapters"),
    [("llama", False), ("phi3_packed", False), ("llama", True)],
    ids=["llama", "packed", "adapters"],
)
def test_what_the_refusal_says_works(ranks4: RankPool, name: str, adapters: bool, tmp_path: Path) -> None:
    ranks4.run(_gathered, name, TP.with_(dp_shard=2), adapters, tmp_path / "out")


def _one_process(folder: Path) -> None:
    """One rank in float32 has whole parameters."""
    model = parallelize(_build("llama"), ParallelConfig(dp_shard=1), None)
    model.save_pretrained(folder)


def test_whole_parameters_are_written(tmp_path: Path) -> None:
    with RankPool(1, timeout=60) as pool:
        pool.run(_one_process, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for key, value in _build("llama").state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
