"""Loops with accelerate on sharded models: every step is that of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from trainer_runs import BATCH, Rows, assert_same, build, on_ranks, state_of
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

from shardwright import ParallelConfig
from shardwright.errors import ConfigError
from shardwright.verify.ranks import RankPool

Shard = Callable[[nn.Module], nn.Module]
FSDP2, TP = ParallelConfig(dp_shard=2), ParallelConfig(tp=2, sequence_parallel=True)
WAYS = {"fsdp2": FSDP2, "tp + sp": TP}
STEPS = 4


def loop(shard: Shard, ranks: int, folder: Path, resume: bool = False) -> dict[str, Any]:
    """A script as people write it, which saves after half of its steps."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(4)
    model = shard(build())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = get_cosine_schedule_with_warmup(optimizer, accelerator.num_processes, STEPS * accelerator.num_processes)
    loader = DataLoader(Rows(16), batch_size=BATCH // ranks)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    assert accelerator.num_processes == ranks
    history, done = [], 0
    if resume:
        accelerator.load_state(folder / "state")
        done = STEPS // 2
    for epoch in range(2):
        for step, batch in enumerate(loader):
            if (epoch * len(loader) + step) // 2 < done:
                continue
            with accelerator.accumulate(model):
                count = accelerator.reduce((batch["labels"][:, 1:] != -100).sum())
                loss = model(**batch, num_items_in_batch=count).loss * accelerator.num_processes
                accelerator.backward(loss)
                norm = accelerator.clip_grad_norm_(model.parameters(), 0.5) if accelerator.sync_gradients else None
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if norm is not None:
                history.append({"grad_norm": float(norm), "loss": float(accelerator.reduce(loss.detach(), "mean"))})
        if not resume and epoch == 0:
            accelerator.save_state(folder / "state")
    guesses = []
    for batch in accelerator.prepare(DataLoader(Rows(10), batch_size=BATCH // ranks)):
        with torch.no_grad():
            logits = model(**batch).logits
        guesses.append(accelerator.gather_for_metrics(logits))
    accelerator.save_model(model, folder / "weights")
    inner = accelerator.unwrap_model(model)
    inner.save_pretrained(
        folder / "plain", is_main_process=accelerator.is_main_process, save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )  # fmt: skip
    accelerator.wait_for_everyone()
    return {"history": history, "state": state_of(model), "guesses": torch.cat(guesses)}


def plain(model: nn.Module) -> nn.Module:
    return model


@pytest.mark.parametrize("config", list(WAYS.values()), ids=list(WAYS))
def test_every_step(ranks2: RankPool, config: ParallelConfig, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    wanted = loop(plain, 1, one)
    for found in ranks2.run(on_ranks, loop, config, two):
        assert found["guesses"].shape == wanted["guesses"].shape
        assert torch.allclose(found["guesses"], wanted["guesses"], atol=1e-3)
        assert_same(found, wanted)
    again = AutoModelForCausalLM.from_pretrained(two / "plain").state_dict()
    saved = load_file(two / "weights" / "model.safetensors")
    for name, value in wanted["state"].items():
        assert torch.allclose(again[name], value, atol=1e-3), name
        assert name == "lm_head.weight" or torch.allclose(saved[name], value, atol=1e-3), name


def test_goes_on_at_another_mesh(ranks2: RankPool, tmp_path: Path) -> None:
    whole_run = ranks2.run(on_ranks, loop, FSDP2, tmp_path)[0]
    for config in (FSDP2, TP):
        found = ranks2.run(on_ranks, loop, config, tmp_path, True)[0]
        assert_same(found, {**whole_run, "history": whole_run["history"][STEPS // 2 :]})


def _early(shard: Shard, ranks: int) -> str:
    model = shard(build())
    accelerator = Accelerator(cpu=True)  # made after the model, which it does not know yet
    accelerator.prepare(DataLoader(Rows(16), batch_size=2))
    with pytest.raises(ConfigError) as caught:
        accelerator.prepare(model)
    return str(caught.value)


def test_loader_prepared_first(ranks2: RankPool) -> None:
    found = ranks2.run(on_ranks, _early, TP)
    assert found[0] == found[1]
    assert "Prepare the model first" in found[0]
