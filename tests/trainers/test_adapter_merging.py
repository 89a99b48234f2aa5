"""PEFT's adapters merged into a sharded model, unmerged, taken off: the weights and logits of plain PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import AdaLoraConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from trainer_runs import Rows, build, on_ranks, state_of
from transformers import AutoModelForCausalLM

from shardwright import ParallelConfig
from shardwright.distributed.planning.tensor import plan_and_resolve
from shardwright.distributed.replay.reading import ModelReading
from shardwright.distributed.runtime.layout import whole
from shardwright.errors import PlanError, ShardwrightError
from shardwright.verify.ranks import RankPool

Shard = Callable[[nn.Module], nn.Module]
ADAPTED: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "o_proj", "down_proj"], "init_lora_weights": False}
KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "trainable tokens": {"trainable_token_indices": [3, 5]},
    "modules to save": {"modules_to_save": ["lm_head"]},
}
FSDP2, TP = ParallelConfig(dp_shard=2), ParallelConfig(tp=2, sequence_parallel=True)


def adapted(kind: str) -> Any:
    tied = {"tie_word_embeddings": True} if kind == "trainable tokens" else {}
    model = build(num_hidden_layers=1, attention_bias=kind == "bias", **tied)
    torch.manual_seed(5)
    made = get_peft_model(model, LoraConfig(**ADAPTED, **KINDS[kind]))
    made.add_adapter("second", LoraConfig(**ADAPTED))
    return made.train()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return whole(model(Rows()[0]["input_ids"][None]).logits).clone()


def step(model: nn.Module) -> None:
    """Train every weight that is trained, and the embedding's neighbours too, for one step."""
    ids = torch.stack([Rows()[index]["input_ids"] for index in range(2)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _merged(shard: Shard, ranks: int, folder: Path, kind: str) -> dict[str, Tensor]:
    """What a user may do to adapters, in one row; the tensors that are compared on the way."""
    model = shard(adapted(kind))
    step(model)
    found = {"trained": logits(model)}
    model.merge_adapter()
    found |= {"merged": logits(model), **{f"merged {name}": value for name, value in state_of(model).items()}}
    with model.disable_adapter():
        found["disabled"] = logits(model)  # which unmerges
    found["enabled"] = logits(model)
    if kind in ("dora", "bias"):  # of the others PEFT takes one adapter at a time
        model.merge_adapter(["default", "second"], safe_merge=True)
        found["both"] = logits(model)
        model.unmerge_adapter()
        model.set_adapter("second")
        step(model)
        found["second"] = logits(model)
        model.set_adapter("default")
    model.delete_adapter("second")
    base = model.merge_and_unload()
    del model
    found["taken off"] = logits(base)
    base.requires_grad_(True)
    step(base)
    found |= {"trained on": logits(base), **state_of(base)}
    base.save_pretrained(folder / kind)
    return found


def _all(shard: Shard, ranks: int, folder: Path, kinds: list[str]) -> dict[str, dict[str, Tensor]]:
    return {kind: _merged(shard, ranks, folder, kind) for kind in kinds}


def _same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, atol=2e-5, rtol=1e-4), name


def test_merged_unmerged_and_taken_off(ranks2: RankPool, ranks4: RankPool, tmp_path: Path) -> None:
    wanted = _all(lambda model: model, 1, tmp_path / "one", list(KINDS))
    for way, (ranks, config, kinds) in {
        "fsdp2": (ranks2, FSDP2, list(KINDS)),
        "tp + sp": (ranks2, TP, list(KINDS)),
        "tp + sp x fsdp2": (ranks4, TP.with_(dp_shard=2), ["bias"]),
    }.items():
        found = ranks.run(on_ranks, _all, config, tmp_path / way, kinds)[-1]
        for kind in kinds:
            print(way, kind)  # shown where it fails
            _same(found[kind], wanted[kind])
            one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / each / kind) for each in ("one", way))
            _same(state_of(two), state_of(one))


def _refused(shard: Shard, ranks: int, folder: Path) -> list[str]:
    """Adapters that come after the model is sharded: refused when it runs, or at once."""
    config = LoraConfig(**ADAPTED)
    adapted("dora").save_pretrained(folder / "adapter")
    plain, has_one = shard(build()), shard(adapted("dora"))
    later: list[Callable[[], Any]] = [
        lambda: get_peft_model(plain, config),
        lambda: get_peft_model(plain, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
        lambda: PeftModel.from_pretrained(plain, folder / "adapter"),
        lambda: plain.add_adapter(config),
        lambda: plain.load_adapter(folder / "adapter"),
        lambda: has_one.add_adapter("third", config),
        lambda: has_one.add_weighted_adapter(["default", "second"], [0.5, 0.5], "third", "linear"),
        lambda: Accelerator(cpu=True).prepare(WithHead(plain)),
    ]
    messages = []
    for change in later:
        with pytest.raises(ShardwrightError) as caught:
            change()
        messages.append(str(caught.value))
    logits(plain), logits(has_one)
    return messages


class WithHead(nn.Module):
    """A sharded model with something beside it that is trained."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.head = model, nn.Linear(4, 4)


def test_adapters_that_come_later(ranks2: RankPool, tmp_path: Path) -> None:
    for config in (FSDP2, TP):
        found = ranks2.run(on_ranks, _refused, config, tmp_path)
        assert found[0] == found[1]
        assert all("parallelize" in message for message in found[0]), found[0]


def test_kinds_that_need_whole_matrices() -> None:
    model = get_peft_model(build(), AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["q_proj"]))
    with pytest.raises(PlanError, match="AdaLoRA"):
        plan_and_resolve(ModelReading(model), None, 2)
