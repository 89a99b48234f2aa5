"""Models that something was put around: value heads, reward heads, a policy beside its reference."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from steps import assert_same_step
from tiny_models import batch, build
from torch import nn
from torch.distributed.tensor import DTensor

from shardwright import ParallelConfig, parallelize
from shardwright.distributed.planning.tensor import plan_and_resolve
from shardwright.distributed.replay.reading import ModelReading
from shardwright.verify.ranks import RankPool, shared_mesh


class WithValue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = build("llama")
        self.value = nn.Linear(self.model.config.hidden_size, 1)


class Named(WithValue):
    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> tuple[Any, torch.Tensor]:
        out = self.model(input_ids=input_ids, labels=labels, output_hidden_states=True)
        return out.loss, self.value(out.hidden_states[-1])


class Keywords(WithValue):
    """What it takes cannot be read off its signature."""

    def forward(self, **kwargs: Any) -> tuple[Any, torch.Tensor]:
        out = self.model(output_hidden_states=True, **kwargs)
        return out.loss, self.value(out.hidden_states[-1])


class Odd(WithValue):
    """What it takes cannot be guessed either: only what it wraps can be run."""

    def forward(self, request: dict[str, torch.Tensor]) -> tuple[Any, torch.Tensor]:
        out = self.model(**request, output_hidden_states=True)
        return out.loss, self.value(out.hidden_states[-1])


class Preference(nn.Module):
    """Two models beside each other."""

    def __init__(self) -> None:
        super().__init__()
        self.policy, self.reference = build("llama"), build("qwen3").requires_grad_(False)

    def forward(self, **kwargs: Any) -> tuple[Any, torch.Tensor]:
        ours, theirs = self.policy(**kwargs), self.reference(**kwargs)
        return ours.loss - 0.1 * theirs.loss, ours.loss


WRAPPERS = {"named": Named, "keywords": Keywords, "odd": Odd, "preference": Preference}
CONFIGS = {
    "tp": ParallelConfig(tp=2, dp_shard=1),
    "tp+sp": ParallelConfig(tp=2, dp_shard=1, sequence_parallel=True),
    "tp+sp x fsdp2": ParallelConfig(tp=2, dp_shard=2, sequence_parallel=True),
}


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return WRAPPERS[kind]().train()


def loss(model: nn.Module) -> torch.Tensor:
    given = {"request": batch(0)} if isinstance(model, Odd) else batch(0)
    first, second = model(**given)
    return first + second.float().mean()


def _exact_and_cut(kind: str, config: ParallelConfig) -> None:
    reference = made(kind)
    model = parallelize(copy.deepcopy(reference), config, shared_mesh(config))
    cut = [p for p in model.parameters() if isinstance(p, DTensor) and p.to_local().numel() < p.numel()]
    assert sum(p.numel() for p in cut) > 0.95 * sum(p.numel() for p in model.parameters())
    assert_same_step(model, reference, loss, kind)


@pytest.mark.parametrize("layout", CONFIGS)
@pytest.mark.parametrize("kind", WRAPPERS)
def test_exact_and_cut(kind: str, layout: str, ranks2: RankPool, ranks4: RankPool) -> None:
    config = CONFIGS[layout]
    (ranks2 if config.least_world_size == 2 else ranks4).run(_exact_and_cut, kind, config)


class Blocks(nn.Module):
    """Nothing in it can be cut: every feature depends on all others in code that is no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"conv": nn.Conv1d(8, 8, 3, padding=1)}) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block["conv"](x)
        return x


def test_where_little_is_cut_a_warning_says_so() -> None:
    resolved = plan_and_resolve(ModelReading(Blocks()), None, 2)[1]
    assert resolved.warnings == [
        "Tensor parallelism cuts nothing of Blocks: all 2 ranks hold, and compute, the rest. Without it (tp=1) those "
        "ranks would work on more data instead."
    ]
    assert not plan_and_resolve(ModelReading(made("keywords")), None, 2)[1].warnings


def _warned() -> list[str]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(f"{record.levelname}: {record.getMessage()}")  # type: ignore[method-assign]
    logging.getLogger("shardwright").addHandler(handler)
    config = CONFIGS["tp"]
    parallelize(Blocks(), config, shared_mesh(config))
    logging.getLogger("shardwright").removeHandler(handler)
    return said


def test_the_warning_is_logged_once(ranks2: RankPool) -> None:
    first, second = ranks2.run(_warned)
    assert [line for line in first if line.startswith("WARNING: Tensor parallelism cuts nothing of Blocks")]
    assert not second
