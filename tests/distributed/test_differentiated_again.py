"""Backward passes beyond the usual: gradients of gradients, and blocks that run again as others checkpoint them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from steps import assert_same_gradients
from tiny_models import batch, build
from torch import nn
from torch.distributed.tensor import DTensor

from shardwright import ParallelConfig, parallelize
from shardwright.errors import UnsupportedError
from shardwright.verify.ranks import RankPool, shared_mesh

TP2 = ParallelConfig(tp=2)
SP2 = ParallelConfig(tp=2, sequence_parallel=True)
BOTH = ParallelConfig(tp=2, dp_shard=2, sequence_parallel=True)


def _gradient_penalty() -> None:
    """A loss with the square of its own gradient in it; the attention kernels cannot, so plain attention."""
    ids = batch(0)["input_ids"]
    for family in ("llama", "qwen3", "phi3"):
        for config in (TP2, SP2):
            reference = build(family, attn_implementation="eager")
            model = parallelize(copy.deepcopy(reference), config, shared_mesh(config))
            for each in (model, reference):
                logits = each(input_ids=ids).logits
                whole = logits.full_tensor() if isinstance(logits, DTensor) else logits
                loss = nn.functional.cross_entropy(whole.flatten(0, 1), ids.flatten())
                weights = [p for name, p in each.named_parameters() if "mlp" in name or "norm" in name]
                penalty = sum(g.square().sum() for g in torch.autograd.grad(loss, weights, create_graph=True))
                (loss + (penalty.full_tensor() if isinstance(penalty, DTensor) else penalty)).backward()
            assert_same_gradients(model, reference, f"{family} {config}")


def test_gradients_of_gradients(ranks2: RankPool) -> None:
    if torch.torch_version.TorchVersion(torch.__version__) >= "2.13":
        ranks2.run(_gradient_penalty)
        return
    with pytest.raises(UnsupportedError, match="gradients of gradients"):
        ranks2.run(_gradient_penalty)


def _loss_on_shards_twice() -> None:
    model = parallelize(build("llama"), TP2, shared_mesh(TP2))
    ids = batch(0)["input_ids"]
    picked = torch.log_softmax(model(input_ids=ids).logits, -1).gather(-1, ids[..., None])
    for loss in (model(**batch(0)).loss, picked.sum()):
        with pytest.raises(UnsupportedError, match=r"differentiated again.*full_tensor"):
            torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


def test_a_loss_on_sharded_logits_is_not_differentiated_twice(ranks2: RankPool) -> None:
    ranks2.run(_loss_on_shards_twice)


def _checkpointing_of_transformers() -> None:
    """Switched on before or after; a block that runs again finds the model's whole parameters put away."""
    for turn, family in enumerate(("qwen3", "gemma3_text")):
        for config in (TP2, SP2) if dist.get_world_size() == 2 else (BOTH,):
            reference, model = build(family), build(family)
            if turn:
                model.gradient_checkpointing_enable()
            parallelize(model, config, shared_mesh(config))
            if not turn:
                model.gradient_checkpointing_enable()
            for each in (model, reference):
                for number in range(2):
                    each(**batch(number)).loss.backward()
            assert_same_gradients(model, reference, f"{family} {config}")


@pytest.mark.parametrize("pool", ["ranks2", "ranks4"])
def test_gradient_checkpointing_enable(request: pytest.FixtureRequest, pool: str) -> None:
    request.getfixturevalue(pool).run(_checkpointing_of_transformers)
