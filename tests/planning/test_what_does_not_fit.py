"""What a plan, a weight or a setting is told that does not fit: which, the numbers, and what to do instead."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from shardwright import ParallelConfig, losses, make_mesh
from shardwright.distributed.apply.guards.parameters import check_scalars
from shardwright.distributed.plan import ParallelPlan
from shardwright.distributed.planning.decide import decide
from shardwright.distributed.replay.reading import ModelReading
from shardwright.distributed.runtime.local_arguments import ArgumentCut
from shardwright.errors import ConfigError, PlanError


class Net(nn.Module):
    """An embedding, an MLP and a head."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(options.pop("rows", 16), 8, **options)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 16, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.head(self.norm(x + self.down(self.up(x).relu())))


def tied() -> Net:
    net = Net()
    net.head.weight = net.embed.weight
    return net


def of_two_dtypes() -> Net:
    net = Net()
    net.norm.weight = nn.Parameter(net.norm.weight.detach().double())
    return net


def llama(**sizes: Any) -> PreTrainedModel:
    small = {"hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 16}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(**{**small, "num_attention_heads": 3, **sizes}))


def decided(
    model: nn.Module, styles: dict[str, str] | None, *, tp: int = 2, fsdp2: bool = False, **changes: Any
) -> None:
    config = ParallelConfig(**{key: value for key, value in changes.items() if key == "shard_ends"})
    plan = {key: value for key, value in changes.items() if key != "shard_ends"}
    ids = (torch.zeros(2, 4, dtype=torch.long),)
    reading = ModelReading(model, None if isinstance(model, PreTrainedModel) else ids)
    decide(reading, config, tp=tp, fsdp2=fsdp2, custom=None if styles is None else ParallelPlan(styles, **plan))


def scalar() -> nn.Module:
    module = nn.Module()
    module.scale = nn.Parameter(torch.ones(()))
    return module


HIDDEN, WEIGHT = torch.ones(2, 4, 8), torch.ones(16, 8)
CASES: dict[str, tuple[type[Exception], Callable[[], Any], str]] = {
    "no process group": (
        ConfigError,
        lambda: make_mesh(ParallelConfig()),
        "torch.distributed is not initialised. Start the script with torchrun and call torch.distributed.init_process",
    ),
    "a scalar parameter": (PlanError, lambda: check_scalars(scalar()), "scale has no dim, and FSDP2 shards"),
    "an embedding's style on a linear layer": (
        PlanError,
        lambda: decided(Net(), {"up": "embedding_rowwise"}),
        "'embedding_rowwise' is for embeddings, but up is a Linear.",
    ),
    "an embedding that writes": (
        PlanError,
        lambda: decided(Net(max_norm=1.0), {"embed": "embedding_rowwise"}),
        "embed renormalises its vectors in forward (max_norm); declare it 'replicate'.",
    ),
    "gradients by frequency": (
        PlanError,
        lambda: decided(Net(scale_grad_by_freq=True), {"embed": "embedding_rowwise"}),
        "embed has gradients by frequency, or sparse ones; declare it 'replicate'.",
    ),
    "fewer rows than ranks": (
        PlanError,
        lambda: decided(Net(rows=3), {"embed": "embedding_rowwise"}, tp=4),
        "embed has 3 rows, too few for 4 tensor-parallel ranks to hold some each.",
    ),
    "a linear layer's style on a norm": (
        PlanError,
        lambda: decided(Net(), {"norm": "colwise"}),
        "'colwise' is for linear layers, but norm is a LayerNorm whose weight has shape (8,).",
    ),
    "a linear layer's style on a model": (
        PlanError,
        lambda: decided(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), {"1": "colwise"}),
        "'colwise' is for linear layers, but 1 is a ReLU without a weight.",
    ),
    "tied weights cut in two ways": (
        PlanError,
        lambda: decided(tied(), {"embed": "embedding_rowwise", "head": "rowwise"}),
        "embed.weight and head.weight are one parameter, but their styles lay it out differently: embed",
    ),
    "heads of an argument": (
        PlanError,
        lambda: decided(Net(), {"up": "colwise", "down": "rowwise"}, local_arguments={"up": ["alibi:0:9"]}),
        "'up' cuts alibi by 9 heads; tp=2 does not divide.",
    ),
    "an argument that says nothing": (
        PlanError,
        lambda: ArgumentCut.parse("alibi:8"),
        "A local argument is written name:dim:heads, as in 'alibi:0:8', not 'alibi:8'.",
    ),
    "an unknown style": (PlanError, lambda: decided(Net(), {"up": "colwize"}), "Unknown parallel style: 'colwize'"),
    "optional without a style": (
        PlanError,
        lambda: ParallelPlan({"up": "colwise"}, optional={"down"}),
        "optional names 'down', which styles does not have.",
    ),
    "a plan without styles": (PlanError, lambda: ParallelPlan.from_dict({}), "A plan needs the key 'styles'"),
    "heads that do not divide": (
        PlanError,
        lambda: decided(llama(), None),
        "has 3 attention heads (3 key-value heads), which tp=2 does not divide.",
    ),
    "two dtypes in one unit": (
        PlanError,
        lambda: decided(of_two_dtypes(), None, tp=1, fsdp2=True),
        "LayerNorm owns trained parameters of several dtypes",
    ),
    "shard_ends of tied weights": (
        PlanError,
        lambda: decided(llama(tie_word_embeddings=True), None, tp=1, fsdp2=True, shard_ends=True),
        "which the model needs from its first step to its last. Leave shard_ends out.",
    ),
    "labels of another shape": (
        ConfigError,
        lambda: losses.linear_cross_entropy(HIDDEN, WEIGHT, torch.zeros(2, 5, dtype=torch.long)),
        "labels of shape (2, 5) do not fit hidden states (2, 4, 8).",
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_it_is_told_what_does_not_fit(name: str) -> None:
    error, call, told = CASES[name]
    with pytest.raises(error, match=re.escape(told)):
        call()
