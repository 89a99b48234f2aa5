"""Data-parallel ranks that run different FSDP2 units: losses, gradients and weights are those of one process."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from steps import assert_same, assert_same_gradients, assert_same_parameters
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import OPTConfig, OPTForCausalLM
from transformers.integrations.fsdp import is_fsdp_managed_module

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
                if each.requires_grad:  # else that batch uses nothing that is trained
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


@pytest.mark.parametrize("pool", ["ranks2", pytest.param("ranks4", marks=pytest.mark.sweep)])
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


# Parameters that one rank uses, with gradients of zero in another's shard


class Extra(nn.Module):
    """A table, of which few rows are read, and a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.factor = nn.Embedding(8, 8), nn.Parameter(torch.ones(2, 8))

    def forward(self, rows: Tensor) -> Tensor:
        return self.table(rows).sum(0) * self.factor[:1] - self.factor[1:]


class Sometimes(nn.Module):
    """A model whose extra part runs where ``rows`` are given."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.extra = nn.Embedding(16, 8), nn.ModuleList([Extra()])
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))

    def forward(self, ids: Tensor, rows: Tensor | None = None, weight: float = 1.0) -> Tensor:
        x = self.embed(ids)
        if rows is not None:
            x = x + self.extra[0](rows) * weight
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


def _rows(index: int, rows: Sequence[int], weight: float, model: nn.Module) -> Tensor:
    ids = torch.randint(16, (2, 6), generator=torch.Generator().manual_seed(index))
    loss: Tensor = model(ids, torch.tensor(rows), weight) if rows else model(ids)
    return loss


def _zeros_in_one_shard(configs: Sequence[ParallelConfig]) -> None:
    cases = [((1,), (), 1.0), ((), (6,), 1.0), ((), (), 1.0), ((2,), (), 0.0), ((), (7,), -0.0), ((3,), (5,), 1.0)]
    steps = [
        (partial(_rows, 2 * n, one, weight), partial(_rows, 2 * n + 1, other, weight))
        for n, (one, other, weight) in enumerate(cases)
    ]
    for config in configs:
        torch.manual_seed(0)
        _compare(Sometimes(), config, steps)
        _compare(Sometimes(), config, steps, accumulate=2)


def test_a_gradient_of_zero_in_one_shard_is_none_nowhere(ranks2: RankPool) -> None:
    """Weight decay must reach all rows of a parameter that any rank has used, and none that no rank has."""
    ranks2.run(_zeros_in_one_shard, (FSDP, ParallelConfig(dp_replicate=2)))


def _marked(config: ParallelConfig) -> list[str]:
    model = parallelize(_opt(), config, shared_mesh(config))
    assert isinstance(model, FSDPModule)
    return [name for name, module in model.named_modules() if is_fsdp_managed_module(module)]


@pytest.mark.parametrize("config", [FSDP, ParallelConfig(tp=2, precision="bf16")])
def test_what_holds_layers_may_drop_them(ranks2: RankPool, config: ParallelConfig) -> None:
    """With one data-parallel rank, too: transformers' models run layers that they drop where FSDP2 marks them."""
    marked = ranks2.run(_marked, config)[0]
    assert "model.decoder" not in marked
    assert "" in marked, "generate() must still agree with all ranks"


# Towers that are frozen in part, and whose last block nobody uses


class Tower(nn.Module):
    """Blocks whose last but one gives the features."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4))

    def forward(self, image: Tensor) -> Tensor:
        found = [self.patches(image)]
        for block in self.blocks:
            found.append(found[-1] + block(found[-1]))
        return found[-2]


class Seeing(nn.Module):
    """A model with a tower and a projector, which run where there is an image."""

    def __init__(self, frozen: str) -> None:
        super().__init__()
        self.embed, self.tower, self.project = nn.Embedding(16, 8), Tower(), nn.Linear(8, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
        for name, param in self.named_parameters():
            param.requires_grad_(not re.match(frozen, name))

    def forward(self, ids: Tensor, image: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        if image is not None:
            x = x + self.project(self.tower(image))
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


FROZEN = {
    "nothing": "$",
    "the tower": "tower",
    "what comes before the tower's blocks": "tower.patches",
    "the first blocks": r"tower.(patches|blocks.[01])",
    "the blocks, not what comes before": "tower.blocks",
    "blocks between others": "tower.blocks.1",
    "all but the projector": "(embed|tower|layers)",
    "the embedding and the tower": "(embed|tower)",
}


def _seen(index: int, seen: bool, model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(index)
    ids, image = torch.randint(16, (2, 6), generator=generator), torch.randn(2, 6, 8, generator=generator)
    loss: Tensor = model(ids, image if seen else None)
    return loss


def _towers(frozen: str, configs: Sequence[ParallelConfig]) -> None:
    seen = ((True, False), (False, True), (True, True), (True, False))
    steps = [(partial(_seen, 2 * n, one), partial(_seen, 2 * n + 1, other)) for n, (one, other) in enumerate(seen)]
    for config in configs:
        torch.manual_seed(0)
        _compare(Seeing(frozen), config, steps)


@pytest.mark.parametrize("frozen", list(FROZEN))
def test_a_tower_that_is_frozen_or_not_used_to_its_end(ranks2: RankPool, frozen: str) -> None:
    ranks2.run(_towers, FROZEN[frozen], (FSDP, FSDP.with_(reshard_after_forward="never", prefetch=2)))
