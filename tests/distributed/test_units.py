"""Blocks that are used while they do not run cannot be FSDP2 units: their parts are, or the root takes them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from steps import assert_same
from tiny_models import assert_exact, batch, build
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import LlamaForCausalLM

from shardwright import ParallelConfig, parallelize
from shardwright.distributed.apply.megatron_fsdp.units import unit_classes
from shardwright.distributed.planning.units import unit_names
from shardwright.distributed.replay.reading import ModelReading
from shardwright.errors import PlanError
from shardwright.verify.ranks import RankPool, shared_mesh
from shardwright.verify.run import Case, run_case
from shardwright.verify.tiny import randomize

WIDTH, VOCABULARY, LAYERS = 16, 96, 3


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.norm(x))))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = Part(), Part(), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return self.norm(x + self.second(x))


class Stack(nn.Module):
    """A language model without attention, its blocks called as usual."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))

    def run(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.run(self.table(input_ids)))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), input_ids.flatten())
        return {"loss": loss, "logits": logits}


class CalledInParts(Stack):
    def run(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = x + block.first(x)
            x = block.norm(x + block.second(x))
        return x


class CalledByItsForward(Stack):
    def run(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block.forward(x)
        return x


class ReadFromOutside(Stack):
    def run(self, x: Tensor) -> Tensor:
        return super().run(x) + self.layers[1].second.down.weight.mean()


class ReadInPieces(Stack):
    def run(self, x: Tensor) -> Tensor:
        first, second = self.layers[1].second.down.weight.chunk(2)
        return super().run(x) + (first * second).mean()


class Reversible(Stack):
    def run(self, x: Tensor) -> Tensor:
        return _Reversed.apply(torch.cat([x, x], -1), self.layers)[..., :WIDTH]


class _Reversed(torch.autograd.Function):
    """Keeps no activation: backward computes every block's input from its output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: nn.ModuleList) -> Tensor:
        a, b = x.chunk(2, -1)
        for block in layers:
            a = a + block(b)
            a, b = b, a
        ctx.layers, ctx.end = layers, (a, b)
        return torch.cat([a, b], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (a, b), (grad_a, grad_b) = ctx.end, grad.chunk(2, -1)
        for block in reversed(ctx.layers):
            a, b, grad_a, grad_b = b, a, grad_b, grad_a
            with torch.enable_grad():
                b = b.detach().requires_grad_()
                # Not block(b): the network's own backward knows what a block is made of.
                x = b + block.first(b)
                y = block.norm(x + block.second(x))
            torch.autograd.backward(y, grad_a)
            a, grad_b = a - y.detach(), grad_b + b.grad
        return torch.cat([grad_a, grad_b], -1), None


def make(kind: type[Stack]) -> nn.Module:
    torch.manual_seed(0)
    model = kind()
    randomize(model)
    return model


BLOCKS = [f"layers.{index}" for index in range(LAYERS)]
PARTS = [f"layers.{index}.{part}" for index in range(LAYERS) for part in ("first", "second")]
KINDS: dict[type[Stack], list[str]] = {
    Stack: BLOCKS,
    CalledInParts: PARTS,
    CalledByItsForward: PARTS,
    ReadFromOutside: [name for name in PARTS if name.endswith("first")],
    ReadInPieces: [name for name in PARTS if name.endswith("first")],
    Reversible: [],
}
CONFIGS = {
    "fsdp": ParallelConfig(dp_shard=2),
    "fsdp+ac": ParallelConfig(dp_shard=2, activation_checkpointing="full"),
    "fsdp x tp": ParallelConfig(dp_shard=2, tp=2),
    "fsdp x tp+sp": ParallelConfig(dp_shard=2, tp=2, sequence_parallel=True),
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_units(kind: type[Stack]) -> None:
    model = make(kind)
    assert unit_names(ModelReading(model)) == KINDS[kind]
    assert unit_names(ModelReading(model.to("meta"))) == KINDS[kind]
    classes = list({type(model.get_submodule(name)) for name in KINDS[kind]}) or [kind]
    assert unit_classes(model, None, unit_names(ModelReading(model))) == classes


def test_frozen_blocks_may_run_without_gradients() -> None:
    class Frozen(Stack):
        def run(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return super().run(x)

    model = make(Frozen)
    assert unit_names(ModelReading(model)) == []
    model.layers.requires_grad_(False)
    assert unit_names(ModelReading(model)) == BLOCKS


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_exact(request: pytest.FixtureRequest, kind: type[Stack], config: ParallelConfig) -> None:
    pool = request.getfixturevalue("ranks2" if config.tp == 1 else "ranks4")
    case = Case(partial(make, kind), partial(batch, vocabulary=VOCABULARY), config, accumulate=2)
    assert_exact(pool.run(run_case, case)[0])


def _which_are_units() -> None:
    for kind, units in KINDS.items():
        model = make(kind)
        config = ParallelConfig(dp_shard=2, tp=2)
        parallelize(model, config, shared_mesh(config))
        found = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
        assert found == ["", *units], kind


def test_tensor_parallelism_before_them_does_not_hide_the_units(ranks4: RankPool) -> None:
    ranks4.run(_which_are_units)


def _past_the_root() -> None:
    """What is in the root's unit can be called alone; what is in a block's cannot."""
    config = ParallelConfig(dp_shard=2, tp=2)
    model, whole = parallelize(build("llama"), config, shared_mesh(config)), build("llama")
    assert isinstance(model, LlamaForCausalLM)
    x = torch.linspace(-1, 1, 4 * 32).view(1, 4, 32)
    assert_same(model.model.norm(x), whole.model.norm(x), "norm")
    with pytest.raises(PlanError, match=r"Linear.*not gathered"):
        model.model.layers[0].mlp.up_proj(x)


def test_parameters_that_are_not_gathered_are_refused(ranks4: RankPool) -> None:
    ranks4.run(_past_the_root)
