"""Beside the steps: optimizers, evaluation, checkpoints, meta devices, precision, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import state
import torch
import training

from shardwright import ParallelConfig
from shardwright.distributed.apply.megatron_fsdp.availability import installed
from shardwright.estimate import predict
from shardwright.verify.ranks import RankPool

STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")


def test_attaching_an_optimizer_changes_nothing(ranks2: RankPool) -> None:
    for found in ranks2.run(state.attaching_changes_nothing):
        assert found == {"groups": True, "same_parameters": True, "weights": 0.0, "gradients": 0.0, "state": 0}


def test_no_step_is_lost_or_added(ranks2: RankPool) -> None:
    assert max(ranks2.run(state.momentum_with_dampening)) < 1e-5


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_evaluation_sees_new_weights(ranks2: RankPool, strategy: str) -> None:
    assert max(ranks2.run(state.evaluation_sees_new_weights, strategy)) < 1e-6


@pytest.mark.parametrize("strategy", ["optim", "optim_grads_params"])
def test_two_forwards_then_two_backwards(ranks2: RankPool, strategy: str) -> None:
    assert max(ranks2.run(state.two_forwards_then_two_backwards, strategy)) < 1e-5


@pytest.mark.skipif(installed() < (0, 6), reason="refused with megatron-fsdp 0.5")
def test_two_models_with_double_buffers(ranks2: RankPool) -> None:
    assert max(ranks2.run(state.two_models_at_once)) < 1e-5


@pytest.mark.parametrize("one_unit", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_parameters_that_take_no_part(ranks2: RankPool, strategy: str, one_unit: bool) -> None:
    for found in ranks2.run(state.parameters_that_take_no_part, strategy, one_unit):
        assert found["missing"] == ["never.weight", "never.bias"]
        assert found["weights"] < 1e-5


def test_gradients_exist_on_every_rank(ranks2: RankPool) -> None:
    for missing, empty in ranks2.run(state.gradients_exist_on_every_rank):
        assert missing == 0
        assert empty > 0


def test_a_gradient_that_is_no_number_is_reported_on_every_rank(ranks2: RankPool) -> None:
    messages = ranks2.run(state.not_a_number, True)
    assert messages[0] == messages[1]
    assert "21 of 21 parameters" in messages[0]
    assert "model.embed_tokens.weight" in messages[0]
    assert ranks2.run(state.not_a_number, False) == ["", ""]


@pytest.mark.parametrize(("saved", "loaded", "strategy"), [(1, 2, "optim_grads_params"), (2, 1, "optim")])
def test_checkpoint_at_another_mesh(ranks2: RankPool, tmp_path: Path, saved: int, loaded: int, strategy: str) -> None:
    expected = ranks2.run(state.train_and_save, str(tmp_path), saved)[0]
    found = ranks2.run(state.load_and_train, str(tmp_path), loaded, strategy)[0]
    assert state.differences(found, expected) < 1e-5


@pytest.mark.parametrize(("tp", "strategy", "tied"), [(1, "optim", False), (2, "optim_grads_params", True)])
def test_meta_device(ranks2: RankPool, tp: int, strategy: str, tied: bool) -> None:
    for found in ranks2.run(state.from_meta, tp, strategy, tied):
        assert found["logits"] < 1e-6
        assert found["names"]
        assert found["ranks"] == 0.0
        assert found["norm"] == 1.0
        assert 0.015 < found["std"] < 0.025
        assert found["halves"] > 0.1


@pytest.mark.parametrize("tp", [1, 2])
def test_bfloat16_compute_keeps_float32_weights(ranks2: RankPool, tp: int) -> None:
    for found in ranks2.run(state.bfloat16_compute, tp):
        assert found["kept"] == 0.0
        assert found["dtypes"] == (torch.float32, torch.float32)
        assert found["stored"] == {torch.float32}
        assert 1e-4 < found["gradients"] < 3e-2


@pytest.mark.parametrize(
    ("options", "stored", "least", "most"),
    [
        ({}, torch.bfloat16, 4e-3, 2e-2),  # summed, and kept between micro-batches, in bfloat16
        ({"grad_reduce_in_fp32": True}, torch.bfloat16, 1e-3, 3e-3),  # rounded once, for the optimizer
        ({"grad_reduce_in_fp32": True, "preserve_fp32_weights": True}, torch.float32, 0.0, 1e-6),
    ],
)
def test_bfloat16_weights(
    ranks2: RankPool, options: dict[str, bool], stored: torch.dtype, least: float, most: float
) -> None:
    for found in ranks2.run(state.bfloat16_weights, options):
        assert found["stored"] == {stored}
        assert least <= found["gradients"] < most


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("foreign", "holds 1 parameters that are not in the LlamaForCausalLM (of shapes (3,))"),
        ("used", "already has state for 21 whole parameters"),
        ("meta", "Set it to False"),
        ("no_dims", "scale has no dims"),
        ("float64", "lm_head.weight is torch.float64"),
        ("axis", "no axis 'data'"),
    ],
)
def test_refused_before_anything_changes(ranks2: RankPool, kind: str, message: str) -> None:
    for found in ranks2.run(state.refusal, kind):
        assert message in found


def test_refuses_the_cpu(ranks2: RankPool) -> None:
    for found in ranks2.run(state.refuses_the_cpu):
        assert "CUDA devices only" in found
        assert "fsdp2" in found


@pytest.mark.parametrize("precision", ["model", "bf16"])
def test_the_memory_between_steps_is_predicted(precision: str, ranks2: RankPool) -> None:
    """But for the padding of the package's buffers, which tiny models have much of."""
    config = ParallelConfig(engine="megatron_fsdp", dp_shard=2, precision=precision)
    memory = predict(training.build_model(), config).memory
    predicted = memory.parameters, memory.gradients, memory.optimizer
    for real in ranks2.run(state.kept_bytes, precision):
        assert real == pytest.approx(predicted, rel=0.03)
