"""PEFT's adapters on sharded models: folders as plain PEFT writes them, read back, resumed by transformers' Trainer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from trainer_runs import Rows, arguments, assert_same, build, on_ranks, result
from transformers import Trainer

from shardwright import ParallelConfig
from shardwright.distributed.runtime.layout import whole
from shardwright.errors import PlanError, ShardwrightError
from shardwright.verify.ranks import RankPool

Shard = Callable[[nn.Module], nn.Module]
FSDP2, TP = ParallelConfig(dp_shard=2), ParallelConfig(tp=2, sequence_parallel=True)
WAYS = {"fsdp2": FSDP2, "tp + sp": TP}
ATTENTION = ["q_proj", "v_proj", "o_proj"]
ADAPTERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=4, target_modules=[*ATTENTION, "down_proj"], init_lora_weights=False),
    "rslora": lambda: LoraConfig(r=4, target_modules=ATTENTION, use_rslora=True, init_lora_weights=False),
    "dora": lambda: LoraConfig(r=4, target_modules=ATTENTION, use_dora=True, init_lora_weights=False),
    "modules to save": lambda: LoraConfig(r=4, target_modules=ATTENTION, modules_to_save=["lm_head"]),
    "trainable tokens": lambda: LoraConfig(r=4, target_modules=ATTENTION, trainable_token_indices=[3, 5]),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": lambda: VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
}


def ids() -> torch.Tensor:
    return Rows()[0]["input_ids"][None]


def adapted(kind: str) -> Any:
    model = build()
    torch.manual_seed(5)
    return get_peft_model(model, ADAPTERS[kind]())


def _train(shard: Shard, ranks: int, folder: Path, kind: str, resume: str | None = None) -> dict[str, Any]:
    args = arguments(folder, ranks, save_strategy="steps", save_steps=2, max_steps=3)
    trainer = Trainer(model=shard(adapted(kind)), args=args, train_dataset=Rows())
    trainer.train(resume_from_checkpoint=None if resume is None else str(folder / resume))
    trainer.model.save_pretrained(folder / "final")
    with torch.no_grad():
        return {**result(trainer), "logits": whole(trainer.model(ids()).logits)}


def _all(shard: Shard, ranks: int, folder: Path) -> dict[str, Any]:
    found = {}
    for kind in ADAPTERS:
        if kind == "ia3" and ranks == 1 and dist.is_initialized():
            with pytest.raises(PlanError, match="IA3"):
                shard(adapted(kind))
        else:
            found[kind] = _train(shard, ranks, folder / kind, kind)
    return found


def _same_folder(one: Path, two: Path) -> None:
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    assert all(torch.allclose(ours[key], value, atol=1e-4) for key, value in theirs.items())
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (one, two)]
    for config in configs:
        config["target_modules"].sort()  # PEFT keeps a set
    assert configs[0] == configs[1]


def test_trained_and_saved(ranks2: RankPool, tmp_path: Path) -> None:
    """Losses, gradient norms and weights of every kind of adapter, and the folders that are written."""
    wanted = _all(lambda model: model, 1, tmp_path / "one")
    for way, config in WAYS.items():
        found = ranks2.run(on_ranks, _all, config, tmp_path / way)[0]
        for kind, ours in found.items():
            print(way, kind)  # shown where it fails
            assert_same(ours, wanted[kind])
            for folder in ("final", "checkpoint-2"):
                _same_folder(tmp_path / way / kind / folder, tmp_path / "one" / kind / folder)
        again = PeftModel.from_pretrained(build(), tmp_path / way / "lora" / "final")
        assert torch.allclose(again(ids()).logits, wanted["lora"]["logits"], atol=1e-4)


def _resumed(shard: Shard, ranks: int, folder: Path) -> dict[str, Any]:
    return _train(shard, ranks, folder, "lora", "checkpoint-2")


def _loaded(shard: Shard, ranks: int, folder: Path) -> list[str]:
    """What was saved is read into a model that has the adapter; a further one is refused."""
    model = shard(adapted("lora"))
    model.load_adapter(folder / "final", "default")
    with torch.no_grad():
        logits = whole(model(ids()).logits)
    assert torch.allclose(logits, torch.load(folder / "logits.pt"), atol=1e-4)
    messages = []
    for name, path in (("second", folder / "final"), ("default", folder.parent / "rslora" / "final")):
        with pytest.raises(ShardwrightError) as caught:
            model.load_adapter(path, name)
        messages.append(str(caught.value))
    return messages


def test_resumed_and_loaded(ranks2: RankPool, tmp_path: Path) -> None:
    wanted = _train(lambda model: model, 1, tmp_path / "lora", "lora")
    _train(lambda model: model, 1, tmp_path / "rslora", "rslora")
    torch.save(wanted["logits"], tmp_path / "lora" / "logits.pt")
    ranks2.run(on_ranks, _train, FSDP2, tmp_path / "two", "lora")
    assert_same(ranks2.run(on_ranks, _resumed, TP, tmp_path / "two")[0], wanted)
    found = ranks2.run(on_ranks, _loaded, TP, tmp_path / "lora")
    assert found[0] == found[1]
    assert "parallelize last" in found[0][0]
    assert "is of another adapter" in found[0][1]
