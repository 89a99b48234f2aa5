"""What some architectures do beyond the usual, each on a Llama: weights read by hand, logits written, shared parts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from steps import assert_same_step
from tiny_models import assert_exact, batch, build
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaForCausalLM

from shardwright import ParallelConfig, parallelize
from shardwright.distributed.models.heads import head_counts
from shardwright.distributed.plan import ParallelPlan
from shardwright.distributed.planning.resolve import resolve
from shardwright.distributed.replay.reading import ModelReading
from shardwright.verify.ranks import RankPool, shared_mesh
from shardwright.verify.run import Case, run_case
from shardwright.verify.tiny import shrunk_config

TP2 = ParallelConfig(tp=2)
SP2 = ParallelConfig(tp=2, sequence_parallel=True)
BOTH = pytest.mark.parametrize("config", [TP2, SP2], ids=["tp", "tp+sp"])


@dataclass
class Instead:
    """A forward set on the instance."""

    forward: Callable[..., Any]
    model: nn.Module

    def __call__(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return self.forward(self.model, input_ids)


def llama(forward: Callable[..., Any]) -> nn.Module:
    model = build("llama")
    model.forward = Instead(forward, model)  # type: ignore[method-assign]
    return model


def result(logits: Tensor, ids: Tensor, more: Tensor | float = 0.0) -> dict[str, Tensor]:
    return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()) + more, "logits": logits}


def reads_rows_of_the_table(model: Any, ids: Tensor) -> dict[str, Tensor]:
    table = model.model.embed_tokens
    padding = torch.where((ids > 50)[..., None], table.weight[3, :].view(1, 1, -1), table(ids) + table.weight[-1])
    logits = LlamaForCausalLM.forward(model, inputs_embeds=padding).logits
    return result(logits, ids, table.weight[1:60:2].square().mean())


def writes_into_logits(model: Any, ids: Tensor) -> dict[str, Tensor]:
    logits = LlamaForCausalLM.forward(model, input_ids=ids).logits
    logits[:, :, [0, 7, 98]] = -20.0
    logits[..., 3] = logits[..., 4].detach() + 0.5
    logits[ids > 90] = 1.0
    return result(logits, ids)


def uses_what_dtensor_has_no_rule_for(model: Any, ids: Tensor) -> dict[str, Tensor]:
    logits = LlamaForCausalLM.forward(model, input_ids=ids).logits
    highest = logits.scatter_reduce(2, ids[..., None], torch.full((*ids.shape, 1), 0.3), "amax")
    return result(logits, ids, highest.square().mean())


@BOTH
@pytest.mark.parametrize(
    "forward",
    [reads_rows_of_the_table, writes_into_logits, uses_what_dtensor_has_no_rule_for],
    ids=lambda f: f.__name__,
)
def test_code_around_the_blocks(ranks2: RankPool, config: ParallelConfig, forward: Callable[..., Any]) -> None:
    assert_exact(ranks2.run(run_case, Case(partial(llama, forward), batch, config))[0])


HALF_NAMED = {
    "model.layers.1.self_attn.q_proj": "colwise",
    "model.layers.1.self_attn.k_proj": "colwise",
    "model.layers.1.self_attn.v_proj": "colwise",
    "model.layers.*.self_attn.o_proj": "rowwise",
}


def of_two_kinds() -> nn.Module:
    """Blocks of one kind get one answer, so one that has no readers in a plan must be of another kind."""
    model = build("llama")
    model.model.layers[0].self_attn.kind = "other"
    return model


@BOTH
def test_a_row_parallel_layer_whose_input_is_whole(ranks2: RankPool, config: ParallelConfig) -> None:
    resolved = resolve(ModelReading(of_two_kinds()), ParallelPlan(HALF_NAMED), 2)
    assert resolved.modules["model.layers.0.self_attn.o_proj"].style == "rowwise_split_input"
    assert resolved.modules["model.layers.1.self_attn.o_proj"].style == "rowwise"
    named = config.with_(plan="test_unusual_models.HALF_NAMED")
    assert_exact(ranks2.run(run_case, Case(of_two_kinds, batch, named))[0])


def sharing_blocks() -> nn.Module:
    model = build("llama", num_hidden_layers=3)
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(model.model.layers[2].mlp, name).weight = getattr(model.model.layers[0].mlp, name).weight
    model.model.layers[2].input_layernorm.weight = model.model.layers[0].input_layernorm.weight
    return model


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_blocks_that_share_parameters(ranks4: RankPool, sequence_parallel: bool) -> None:
    config = ParallelConfig(tp=2, dp_shard=2, sequence_parallel=sequence_parallel)
    assert_exact(ranks4.run(run_case, Case(sharing_blocks, batch, config, 2))[0])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Tower(nn.Module):
    """A text model with a tower that runs when there is an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.layers, self.tower = (nn.ModuleList(Block() for _ in range(2)) for _ in range(2))

    def forward(self, ids: Tensor, image: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        for layer in (*self.layers, *(self.tower if image is not None else ())):
            x = layer(x)
        return x


def test_blocks_that_the_trial_does_not_reach_stay_whole() -> None:
    plan = ParallelPlan(
        {f"{name}.*.mlp.{n}": s for name in ("layers", "tower") for n, s in ((0, "colwise"), (2, "rowwise"))}
    )
    resolved = resolve(ModelReading(Tower()), plan, 2, sequence_parallel=True)
    assert resolved.blocks == ["layers.0", "layers.1"]
    assert resolved.whole_blocks == ["tower.0", "tower.1"]


@pytest.mark.skipif("dots3_note_text" not in CONFIG_MAPPING, reason="this version of transformers has no such model")
def test_heads_that_differ_by_layer() -> None:
    config = shrunk_config(CONFIG_MAPPING["dots3_note_text"]())
    with torch.device("meta"):
        counts = head_counts(AutoModelForCausalLM.from_config(config))
    assert counts is not None
    assert counts.layers == ((4, 4), (8, 8))


class Owner:
    """What a user's hook may be bound to: something that nobody can copy."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.seen = 0

    def hook(self, module: nn.Module, args: Any, output: Any) -> None:
        self.seen += 1


def _with_locks() -> nn.Module:
    model = build("qwen3")
    model.model.lock, model.model.stream = threading.Lock(), iter(range(3))
    model.model.last = torch.ones(2, requires_grad=True) * 2
    model.model.layers[0].register_forward_hook(Owner().hook)
    return model


def _same_step_with_locks(config: ParallelConfig) -> None:
    model, reference = _with_locks(), _with_locks()
    parallelize(model, config, shared_mesh(config))
    assert_same_step(model, reference, lambda each: each(**batch(0)).loss, str(config))


@pytest.mark.parametrize("config", [SP2, ParallelConfig(dp_shard=2)])
def test_models_that_hold_what_cannot_be_copied(config: ParallelConfig, ranks2: RankPool) -> None:
    ranks2.run(_same_step_with_locks, config)
