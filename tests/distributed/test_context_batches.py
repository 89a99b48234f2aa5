"""Batches that are split over the context-parallel ranks before the model sees them, against one process."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_context_parallel import CP2, embedded, padded
from tiny_models import batch, build
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardwright import ParallelConfig, parallelize, shard_batch
from shardwright.errors import ConfigError
from shardwright.verify.ranks import RankPool, shared_mesh

BOTH = CP2.with_(tp=2, sequence_parallel=True)


def part_of(whole: dict[str, Any], cp: Any) -> dict[str, Any]:
    """What a loader would give this rank of ``whole``."""
    rank, ranks = cp.get_local_rank(), cp.size()
    return {name: x.chunk(ranks, 1)[rank] for name, x in whole.items()}


def gradients(model: nn.Module) -> list[Tensor]:
    found = [param.grad for param in model.parameters() if param.grad is not None]
    return [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in found]


def furthest(ours: nn.Module, one: nn.Module) -> float:
    pairs = zip(gradients(ours), gradients(one), strict=True)
    return max(float((x - y).norm() / y.norm()) for x, y in pairs)


def _trained(config: ParallelConfig) -> dict[str, float]:
    """Relative errors of losses and gradients, for every way to hand over a batch."""
    mesh, found = shared_mesh(config), {}
    one, ours = build("llama"), parallelize(build("llama"), config, shared_mesh(config))
    for name in ("split", "parts", "evaluated", "own loss", "embeddings"):
        whole = embedded(0) if name == "embeddings" else padded(0) if name != "parts" else batch(0, rows=3, length=13)
        given = {key: nn.Parameter(x) if x.is_floating_point() else x for key, x in whole.items()}
        if name == "parts":
            made = shard_batch(part_of(given, mesh["cp"]), mesh, already_split=True)
        else:
            made = shard_batch(given, mesh)
        assert all(x.shape == whole[key].shape for key, x in made.items()), name
        assert made["labels"].to_local().shape[1] < whole["labels"].shape[1], name
        one.zero_grad()
        ours.zero_grad()
        if name == "evaluated":
            with torch.no_grad():
                found[name] = float((ours.eval()(**made).loss / one.eval()(**whole).loss - 1).abs())
            ours.train(), one.train()
            continue
        if name == "own loss":
            labels, out = made.pop("labels"), ours(**made)
            loss = F.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
            expected = F.cross_entropy(one(**whole).logits.flatten(0, 1), whole["labels"].flatten())
        elif name == "embeddings":
            mine = nn.Parameter(whole["inputs_embeds"])
            loss, expected = ours(**made).loss, one(inputs_embeds=mine, labels=whole["labels"]).loss
        else:
            loss, expected = ours(**made).loss, one(**whole).loss
        loss.backward()
        expected.backward()
        if name == "embeddings":
            found["their gradient"] = float((given["inputs_embeds"].grad - mine.grad).norm() / mine.grad.norm())
        found[name] = float((loss / expected - 1).abs())
        found[f"gradients of {name}"] = furthest(ours, one)
    return found


def test_split_batches(ranks2: RankPool) -> None:
    for found in ranks2.run(_trained, CP2):
        assert len(found) == 10
        assert all(error < 1e-5 for error in found.values()), found


def test_split_batches_with_tensor_parallel_ranks(ranks4: RankPool) -> None:
    for found in ranks4.run(_trained, BOTH):
        assert all(error < 1e-5 for error in found.values()), found


def _mistakes() -> list[str]:
    mesh, messages = shared_mesh(CP2), []
    whole, rank = batch(0), dist.get_rank()
    part = part_of(whole, mesh["cp"])
    uneven = {name: x[:, :9] if rank == 0 else x[:, 9:] for name, x in whole.items()}
    model = parallelize(build("llama"), CP2, mesh)
    for wrong in (
        lambda: shard_batch(batch(rank), mesh),
        lambda: shard_batch(part, mesh),
        lambda: shard_batch(whole, mesh, already_split=True),
        lambda: shard_batch(uneven, mesh, already_split=True),
        lambda: shard_batch({**part, "weights": torch.full((1,), rank)}, mesh, already_split=True),
        lambda: shard_batch(shard_batch(whole, mesh), mesh),
        lambda: shard_batch({"lengths": torch.ones(3)}, mesh),
        lambda: model(**part),
    ):
        with pytest.raises(ConfigError) as error:
            wrong()
        messages.append(str(error.value))
    return messages


def test_mistakes_are_refused(ranks2: RankPool) -> None:
    first, second = ranks2.run(_mistakes)
    assert first == second
    expected = [
        "different batches on ranks 0 and 1.*already_split=True",
        "different batches on ranks 0 and 1.*already_split=True",
        "the same input_ids of 15 positions on all 2 ranks.*Leave already_split out",
        r"was given \[9, 6\] positions.*must have the sizes \[8, 7\]",
        "batches of different forms",
        "input_ids, which is split already",
        "no tensor .batch, positions",
        r"context-parallel group were called with different inputs.*shard_batch\(batch, mesh, already_split=True\)",
    ]
    for message, pattern in zip(first, expected, strict=True):
        assert re.search(pattern, message), (pattern, message)
