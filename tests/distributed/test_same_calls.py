"""Ranks of a tensor-parallel group that are given different batches, or drop different elements, are told."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from steps import assert_same
from tiny_models import batch, build

from shardwright import ParallelConfig, parallelize
from shardwright.errors import ConfigError
from shardwright.verify.ranks import RankPool, shared_mesh

TP = ParallelConfig(tp=2)
DROPS = {"attention_dropout": 0.5}


def _model(config: ParallelConfig = TP, **changes: Any) -> Any:
    return parallelize(build("llama", **changes), config, shared_mesh(config))


def _refusal(model: Any, inputs: dict[str, torch.Tensor]) -> str:
    with pytest.raises(ConfigError) as caught:
        model(**inputs)
    return str(caught.value)


def _different_batches() -> tuple[str, str]:
    lengths = {name: ids[:, : 5 + dist.get_rank()] for name, ids in batch(0).items()}
    return _refusal(_model(), batch(dist.get_rank())), _refusal(_model().eval(), lengths)


def test_different_batches(ranks2: RankPool) -> None:
    found = ranks2.run(_different_batches)
    assert found[0] == found[1]
    for message in found[0]:
        assert message.startswith("Ranks 0 and 1 of a tensor-parallel group were called with different inputs")
        assert "mesh['dp']" in message


def _different_seeds(changes: dict[str, Any]) -> str | None:
    model = _model(**changes)
    torch.manual_seed(dist.get_rank())
    if changes:
        return _refusal(model, batch(0))
    model(**batch(0)).loss.backward()
    return None


def test_different_seeds(ranks2: RankPool) -> None:
    """A mistake where the model draws random numbers; else nobody's business."""
    found = ranks2.run(_different_seeds, DROPS)
    assert found[0] == found[1]
    assert "different random states" in str(found[0])
    assert ranks2.run(_different_seeds, {}) == [None, None]


def _each_group_its_own() -> None:
    """Batches and seeds by the data-parallel rank; floats may differ in their last bits."""
    config = ParallelConfig(tp=2, dp_shard=2)
    mesh, model = shared_mesh(config), _model(config, **DROPS)
    torch.manual_seed(mesh.get_local_rank("dp_shard"))
    model(**batch(mesh.get_local_rank("dp_shard"))).loss.backward()
    embeds = model.model.embed_tokens.weight.full_tensor()[batch(0)["input_ids"]].detach()
    model.eval()(inputs_embeds=embeds + 1e-7 * dist.get_rank())


def test_each_group_its_own(ranks4: RankPool) -> None:
    ranks4.run(_each_group_its_own)


def _a_copy() -> None:
    reference = build("llama")
    model = copy.deepcopy(_model())
    for index in range(2):
        assert_same(model(**batch(index)).loss, reference(**batch(index)).loss, "loss")
    model(**batch(dist.get_rank()))  # the first call only


def test_only_the_first_call_is_compared(ranks2: RankPool) -> None:
    ranks2.run(_a_copy)
