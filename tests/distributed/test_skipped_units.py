"""Data-parallel ranks that run different FSDP2 units: losses, gradients and weights are those of one process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from steps import assert_same, assert_same_gradients, assert_same_parameters
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from shardwright import ParallelConfig, parallelize
from shardwright.verify.public import case_of
from shardwright.verify.ranks import RankPool, shared_mesh
from shardwright.verify.tiny import randomize

FSDP = ParallelConfig(dp_shard=2)
LAYERDROP = 0.4

Loss = Callable[[nn.Module], Tensor]


def _index() -> int:
    """This rank's place among two data-parallel ranks."""
    return dist.get_rank() * 2 // dist.get_world_size()


def _compare(whole: nn.Module, config: ParallelConfig, steps: Sequence[tuple[Loss, Loss]], accumulate: int = 1) -> None:
    """Train on both: in each of ``steps``, the losses of the two data-parallel ranks; evaluate before each."""
    model = parallelize(copy.deepcopy(whole), config, shared_mesh(config))
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.01, eps=1e-2, weight_decay=0.1) for each in (model, whole)]
    for first in range(0, len(steps), accumulate):
        for number, losses in enumerate(steps[first : first + accumulate], start=first):
            with torch.no_grad():
                assert_same(losses[_index()](model), losses[_index()](whole), f"{config}: evaluation {number}")
            ours = losses[_index()](model)
            theirs = [each(whole) for each in losses]
            assert_same(ours, theirs[_index()], f"{config}: loss {number}")
            ours.backward()
            for each in theirs:
                (each / 2).backward()
        assert_same_gradients(model, whole, f"{config}: step {first}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert_same_parameters(model, whole, f"{config}: after step {first}")


# Layers that are dropped


def _opt() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "ffn_dim": 96, "word_embed_proj_dim": 64, "num_attention_heads": 4}
    config = OPTConfig(
        vocab_size=100, num_hidden_layers=4, max_position_embeddings=64, layerdrop=LAYERDROP, dropout=0.0, **sizes
    )
    config.attention_dropout = 0.0
    model = OPTForCausalLM(config).train()
    randomize(model)
    return model


def _dropping(layers: set[int], index: int) -> Loss:
    """The loss of a batch of its own, with these layers dropped."""
    ids = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(index))
    for seed in range(10000):
        torch.manual_seed(seed)
        if {n for n in range(4) if torch.rand([]).item() < LAYERDROP} == layers:
            return partial(_seeded, seed, ids)
    raise AssertionError(layers)


def _seeded(seed: int, ids: Tensor, model: nn.Module) -> Tensor:
    torch.manual_seed(seed)
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def _layerdrop(configs: Sequence[ParallelConfig]) -> None:
    drops = ([{0}, {1}], [{3}, set()], [{0, 1, 2, 3}, {2}], [{1}, {1}], [{1, 2}, {3}], [set(), set()])
    steps = [(_dropping(one, 2 * n), _dropping(other, 2 * n + 1)) for n, (one, other) in enumerate(drops)]
    for config in configs:
        _compare(_opt(), config, steps)
    _compare(_opt(), configs[0], steps, accumulate=2)


OF_TWO = (
    FSDP,
    FSDP.with_(reshard_after_forward="always", activation_checkpointing="full"),
    FSDP.with_(reshard_after_forward="never", prefetch=2),
    ParallelConfig(dp_replicate=2),
)
OF_FOUR = (FSDP.with_(tp=2), FSDP.with_(tp=2, sequence_parallel=True))


@pytest.mark.parametrize("pool", ["ranks2", "ranks4"])
def test_ranks_that_drop_different_layers(pool: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(pool).run(_layerdrop, OF_TWO if pool == "ranks2" else OF_FOUR)


# Batches without images


def _losses(batches: Callable[[int], dict[str, Any]]) -> Callable[[int, bool], Loss]:
    def loss(index: int, images: bool, model: nn.Module) -> Tensor:
        batch = batches(index)
        if not images:
            generator = torch.Generator().manual_seed(100 + index)
            ids = torch.randint(4, 79, (2, 12), generator=generator)
            batch = {"input_ids": ids, "labels": ids}
            if "token_type_ids" in batches(index):
                batch["token_type_ids"] = torch.zeros_like(ids)
        found: Tensor = model(**batch).loss
        return found

    return lambda index, images: partial(loss, index, images)


def _modalities(model_type: str, configs: Sequence[ParallelConfig]) -> None:
    case = case_of(model_type, ParallelConfig(tp=2))
    loss = _losses(case.batch)  # type: ignore[arg-type]
    pictured = ((True, False), (False, False), (False, True), (True, True))
    steps = [(loss(2 * n, one), loss(2 * n + 1, other)) for n, (one, other) in enumerate(pictured)]
    for config in configs:
        _compare(case.build(), config, steps)


VISION = ("qwen2_5_vl", "gemma3", "mllama")


@pytest.mark.parametrize("model_type", VISION)
def test_a_rank_without_images(ranks2: RankPool, model_type: str) -> None:
    ranks2.run(_modalities, model_type, (FSDP,))
