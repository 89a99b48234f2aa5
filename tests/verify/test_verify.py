"""``verify`` says exact of what is exact, and catches every mistake that is known from real libraries."""

from __future__ import annotations

import planted
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, OPTConfig

from shardwright import ParallelConfig
from shardwright.errors import ConfigError, PlanError
from shardwright.verify import RankPool, verify
from shardwright.verify.stages import CrashError, ShrinkError

FSDP2 = ParallelConfig(dp_shard=2)
TP2 = ParallelConfig(tp=2)


def test_tensor_parallelism_of_another_make_is_found_exact(ranks2: RankPool) -> None:
    report = verify("llama", TP2, parallelize=planted.by_hand, accumulate=2, pool=ranks2)
    assert report.exact, report.summary()
    assert 0 < report.max_grad_rel_err < 1e-5
    assert 0.5 < report.sharded_fraction < 1
    assert report.plan_source == "custom: by_hand"
    assert report.first_module is None


def test_a_q_norm_left_out_is_caught(ranks2: RankPool) -> None:
    report = verify("qwen3", TP2, parallelize=planted.q_norm_left_out, pool=ranks2)
    assert not report.exact
    assert report.max_grad_rel_err > 0.1
    assert report.worst_parameter.endswith(("q_norm.weight", "k_norm.weight"))
    assert report.first_in == "backward"
    assert report.first_module is not None
    assert report.first_module[0].startswith("model.layers.1.self_attn.")
    assert report.loss_diff < 1e-5  # the forward pass is right, which is what makes this mistake survive


def test_a_packed_weight_cut_as_a_block_is_caught(ranks2: RankPool) -> None:
    report = verify("phi3", TP2, parallelize=planted.packed_cut_as_block, pool=ranks2)
    assert not report.exact
    assert report.logits_rel_err > 0.01
    assert report.first_in == "forward"
    assert report.first_module is not None
    assert report.first_module[0].startswith("model.layers.0.mlp")


def test_a_broken_tie_is_caught(ranks2: RankPool) -> None:
    tied = LlamaConfig(tie_word_embeddings=True)
    report = verify(tied, TP2, parallelize=planted.by_hand, pool=ranks2)
    assert not report.exact
    assert "lm_head.weight" in report.problems[0]
    assert "a tie that broke" in report.summary()


def test_a_gradient_reduced_twice_is_caught_only_under_accumulation(ranks2: RankPool) -> None:
    once = verify("qwen3", TP2, parallelize=planted.reduced_twice, pool=ranks2)
    assert once.exact, once.summary()
    twice = verify("qwen3", TP2, parallelize=planted.reduced_twice, accumulate=2, pool=ranks2)
    assert not twice.exact
    assert twice.worst_parameter.endswith(("q_norm.weight", "k_norm.weight"))


def test_mistakes_of_loops_are_caught(ranks2: RankPool) -> None:
    """Each is right in a loop of one step without an evaluation before it."""
    stale = verify("llama", TP2, parallelize=planted.evaluated_with_a_copy, pool=ranks2)
    assert stale.max_grad_rel_err < 1e-5
    assert stale.parameter_rel_err < 1e-5 < stale.logits_rel_err
    lost = verify("llama", TP2, parallelize=planted.gradients_lost_in_evaluation, pool=ranks2)
    assert (lost.max_grad_rel_err, lost.worst_parameter) == (1.0, "model.norm.weight")
    torchs = verify("llama", FSDP2, parallelize=planted.fsdp2_of_torch, pool=ranks2)
    assert not torchs.exact


@pytest.mark.parametrize("settings", [{"dp_shard": 2}, {"tp": 2, "sequence_parallel": True}, {"dp_replicate": 2}])
def test_layers_that_are_dropped(ranks2: RankPool, settings: dict[str, int]) -> None:
    """Data-parallel ranks drop other layers; those of one tensor-parallel group the same ones."""
    report = verify(OPTConfig(layerdrop=0.1), ParallelConfig(**settings), accumulate=2, pool=ranks2)
    assert report.exact, report.summary()


def test_layers_that_transformers_would_run_under_fsdp(ranks2: RankPool) -> None:
    """This model runs what it drops, and uses it, where FSDP2 says that ranks must run alike."""
    report = verify("nllb-moe", FSDP2, pool=ranks2)
    assert report.exact, report.summary()


def test_a_mistake_on_one_rank_only_is_caught(ranks2: RankPool) -> None:
    report = verify("llama", TP2, parallelize=planted.wrong_on_rank_1, pool=ranks2)
    assert not report.exact
    assert report.logits_rel_err > 1e-3


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_shardwright_itself_is_exact(ranks2: RankPool, sequence_parallel: bool) -> None:
    report = verify("qwen3", TP2.with_(sequence_parallel=sequence_parallel), accumulate=2, pool=ranks2)
    assert report.exact, report.summary()
    assert report.sharded_fraction == 1.0
    assert report.precision == "float32"


def test_everything_together_is_exact(ranks4: RankPool) -> None:
    config = ParallelConfig(tp=2, dp_shard=2, sequence_parallel=True, activation_checkpointing="full")
    report = verify("gemma3_text", config, accumulate=2, pool=ranks4)
    assert report.exact, report.summary()
    assert report.world_size == 4


class Regression(nn.Module):
    """A model that is no language model: its batch, its loss and its mapping are its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.unused = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        for layer in self.layers:
            x = layer(x)
        return {"loss": (x - y).square().mean()}


def make_regression() -> nn.Module:
    torch.manual_seed(3)
    return Regression()


def regression_batch(index: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(index)
    return {name: torch.randn(4, 8, generator=generator) for name in ("x", "y")}


def crash_on_rank(model: nn.Module, config: ParallelConfig, mesh: object) -> nn.Module:
    del model.layers[1][0].weight
    return model


def test_a_users_own_model(ranks2: RankPool) -> None:
    config = ParallelConfig(dp_shard=2)
    report = verify(make_regression, config, batch=regression_batch, accumulate=2, pool=ranks2)
    assert report.exact, report.summary()
    assert report.logits_rel_err < 1e-5  # of the losses of its evaluations: it has no logits
    assert report.plan_source == "none: tp is 1"


def test_what_breaks_and_when(ranks2: RankPool) -> None:
    with pytest.raises(CrashError, match="runs in one process, but fails when it is sharded: AttributeError"):
        verify(
            make_regression, ParallelConfig(dp_shard=2), batch=regression_batch, parallelize=crash_on_rank, pool=ranks2
        )
    with pytest.raises(ShrinkError, match="does not run in one process: TypeError"):
        verify(make_regression, ParallelConfig(dp_shard=2), pool=ranks2)  # a batch of token ids
    with pytest.raises(PlanError, match="attention heads"):
        verify(LlamaConfig(num_attention_heads=3, num_key_value_heads=3, hidden_size=48), TP2, pool=ranks2)
    with pytest.raises(ConfigError, match="world size is 2"):
        verify("llama", ParallelConfig(tp=4), pool=ranks2)
    with pytest.raises(ConfigError, match="Did you mean qwen3"):
        verify("qwen33", TP2, pool=ranks2)


def test_rounding_that_a_model_amplifies_is_told_from_a_mistake(ranks2: RankPool) -> None:
    report = verify("deepseek_v4", TP2, pool=ranks2)  # its router's gradients are off by 7e-5 in float32
    assert report.exact, report.summary()
    assert report.precision == "float64"
    assert report.worst_error < 1e-9
    wrong = verify("qwen3", TP2, parallelize=planted.q_norm_left_out, pool=ranks2)
    assert wrong.float64_rel_err == pytest.approx(wrong.worst_error, rel=0.01)
